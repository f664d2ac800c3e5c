from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.filters import contaminated, degenerate, duplicates
from jaxsft.data.rows import Conversation, Turn


def chat(prompt: str, reasoning: str = "r", answer: str = "a") -> Conversation:
    turns = (Turn("user", prompt), Turn("assistant", AnswerTemplate().join(reasoning, answer)))
    return Conversation(turns, reasoning, answer)


def test_duplicates_are_equal_text_for_text():
    seen = duplicates()
    assert [seen(chat(p)) is None for p in ("a", "b", "a", "A", "a")] == [
        True, True, False, True, False,
    ]  # fmt: skip


def test_held_out_prompts():
    question = "How many legs have three spiders and two birds in all together"
    found = contaminated([chat(question), chat("What is 2 * 3?"), chat("???!")])
    rejected = found(chat(f"  HOW {question[4:].upper()}"))
    assert rejected is not None and rejected.detail == "the prompt of held-out sample 1"
    assert found(chat(f"Tell me: {question}? Please.")) is not None
    assert found(chat("How many legs have three spiders and two birds")) is None  # 2 runs of 5
    assert found(chat("How many legs have three spiders and two birds in all")) is not None  # 3
    assert found(chat("what is  2 * 3?")) is not None
    assert found(chat("What is 2 + 3?")) is None
    assert found(chat("???!")) is not None


def test_instructions_that_prompts_share_tell_nothing():
    instruction = "Solve the following problem step by step and give the final number alone. "
    tasks = ["Tom has nine red apples and eats two of them.", "A train goes for three hours."]
    found = contaminated([chat(instruction + task) for task in tasks])
    assert found(chat(instruction + "A shop sells four pens a day, how many in a week?")) is None
    assert found(chat("So: " + instruction + tasks[0])) is not None


def test_loops_and_filler():
    assert degenerate(chat("p", answer="I hope this helps!")) is not None
    assert degenerate(chat("p", answer="I hope this helps: 4")) is None
    assert degenerate(chat("p", reasoning="Some thought. " + "Wait, no. " * 100)) is not None
    numbers = " ".join(str(number * number) for number in range(300))
    assert degenerate(chat("p", reasoning=numbers, answer=numbers)) is None
    assert degenerate(chat("p", answer="-" * 100)) is None  # short: a line, not a loop


def test_every_trained_answer_of_a_chat_is_judged():
    def judged(*answers: str, trained: bool = True):
        turns = [t for a in answers for t in (Turn("user", "p"), Turn("assistant", a, trained))]
        return degenerate(Conversation((*turns[:-1], Turn("assistant", answers[-1])), None, None))

    loop, thought = "Wait, no. " * 100, "<reasoning>" + "Wait, no. " * 100 + "</reasoning>4"
    assert judged("Four.", "Thank you.") is None and judged("Sure.", "Thank you.") is not None
    assert judged("Four.", "Five.", loop).detail == ('the answer ends in a loop: 100 x "Wait, no."')
    for text in (loop, thought):
        assert judged(text, "Five.").detail.startswith("the earlier answer ends in a loop")
        assert judged(text, "Five.", trained=False) is None
