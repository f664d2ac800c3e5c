"""The inspect command on rows that can be counted by hand, and on sets that were spoilt."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxsft.data.packing import PackedRows, Sample
from jaxsft.data.prepared import Prepared, open_prepared, sealed, source_of
from jaxsft.data.samples import DataReport
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.inspect.__main__ import main
from jaxsft.inspect.rows import SampleCheck, survey
from jaxsft.inspect.tokens import view_row

T = 64
EVIL = "<script>document.title='evil'</script>"
ROWS = [
    {"prompt": f"{EVIL}?", "response": "<think>No.</think>\nA"},
    {"prompt": "Why?", "response": "No thought <b>at all</b>."},
    {"prompt": "é\u202e", "response": "<think>\x1b[31mRed</think>\nLiteral <end_of_turn>"},
    {"prompt": "Why?", "response": "<think>Because.</think>\nB"},
    {"prompt": "Why?", "response": "<think>Because.</think>\nB"},
]

Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A directory with config.yaml and rows.jsonl: samples from rows 1, 3 and 4, each its own row.

    Row 2 has no thought, row 5 is row 4 again.
    """
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = {
        "model": {"path": str(tiny_model_dir)},
        "data": {
            "train_files": [str(tmp_path / "rows.jsonl")],
            "prepared_dir": str(tmp_path / "prepared"),
            "max_length": T,
            "max_drop": 0.5,
            "system_prompt": None,
            "without_thought": "reject",
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def inspect(files: Path, capsys: pytest.CaptureFixture[str]) -> Inspect:
    def inspect(*options: str) -> tuple[int, str, str]:
        """(exit code, what it printed, what it complained of)."""
        code = main(["--config", str(files / "config.yaml"), *options])
        return code, *capsys.readouterr()

    return inspect


@pytest.fixture
def tiny_tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(tiny_model_dir / "tokenizer.model")


def prepared_directory(files: Path) -> Path:
    return next(path.parent for path in (files / "prepared").glob("*/manifest.json"))


def expected_lengths(tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """(tokens, tokens with loss) of the three samples, from the template written out."""
    lengths = []
    for prompt, reasoning, answer in (
        (f"{EVIL}?", "No.", "A"),
        ("é\u202e", "\x1b[31mRed", "Literal <end_of_turn>"),
        ("Why?", "Because.", "B"),
    ):
        completion = f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"
        # Five control tokens: <bos><start_of_turn>…<end_of_turn>…<start_of_turn>…<end_of_turn>
        texts = (f"user\n{prompt}", "\n", "model\n", completion)
        parts = [len(tokenizer.encode(text)) for text in texts]
        lengths.append((5 + sum(parts), parts[-1] + 1))
    return lengths


def test_counts_by_hand(inspect: Inspect, files: Path, tiny_tokenizer: Tokenizer) -> None:
    code, out, err = inspect("--rows", "1")
    assert (code, err) == (0, "")
    lengths, labels = zip(*expected_lengths(tiny_tokenizer), strict=True)
    total, loss, longest = sum(lengths), sum(labels), max(lengths)
    assert longest < T
    facts = [" ".join(line.split()) for line in out.splitlines()]
    assert "rows 3 of 64 tokens" in facts
    assert "samples 3; 1.0 a row" in facts
    assert f"tokens {total}; {total / 3:.0f} a sample" in facts
    assert f"loss tokens {loss} ({loss / total:.1%} of the tokens)" in facts
    assert f"padding {1 - total / (3 * T):.1%} of all positions" in facts
    low, middle = sorted(lengths)[:2]
    assert (
        f"sample length p1 {low}, p5 {low}, p10 {low}, p50 {middle}, p90 {longest}, "
        f"p95 {longest}, p99 {longest}, max {longest}"
    ) in facts
    assert facts[facts.index("5 rows were read:") + 1 :][:5] == [
        "3 kept",
        "0 of these shortened",
        f"1 rejected: duplicate {files}/rows.jsonl:5 (the same conversation came before)",
        f"1 rejected: no_thought {files}/rows.jsonl:2 (an answer has no thought, or an empty one)",
        "– rejected: contaminated not looked for",
    ]
    assert out.count("  ok      ") == 5 and "FAILED" not in out
    lessons = dict(line.split(maxsplit=1) for line in facts[facts.index("What is taught:") :][3:8])
    assert lessons == {
        "{reasoning}": "from <reasoning> to </reasoning>",
        "{answer}": "from <answer> to </answer>",
        "without_thought": "reject: rows with such an answer are left out (0 samples)",
        "earlier_reasoning": "keep: every turn is trained, and later ones see its reasoning",
        f"{files}/rows.jsonl": "columns used: prompt, response; not used: none",
    }
    assert f"padding: {T - lengths[0]} tokens" in out
    assert out.count("━━ row") == 1


def test_mask_and_ids_can_be_read_without_colours(
    inspect: Inspect, files: Path, tiny_tokenizer: Tokenizer
) -> None:
    _, out, _ = inspect("--row", "1")
    assert f"── segment 1: sample 1, {files}/rows.jsonl:row 3; " in out
    # What is hidden in the data shows, and a literal <end_of_turn> is told from the control token.
    assert (
        "⟨bos⟩⟨start_of_turn⟩user↵\né\\u{202e}⟨end_of_turn⟩↵\n⟨start_of_turn⟩model↵\n"
        "⟦<reasoning>\\u{1b}[31mRed</reasoning>↵\n"
        "<answer>Literal <end_of_turn></answer>⟨end_of_turn⟩⟧\n"
    ) in out
    assert "\x1b" not in out
    _, out, _ = inspect("--row", "1", "--row", "2", "--ids")
    assert f"⟨end_of_turn⟩⁽{tiny_tokenizer.end_of_turn_id}⁾⟧" in out
    accent = tiny_tokenizer.encode("é")
    assert len(accent) == 2  # two bytes in this vocabulary
    assert f"é⁽{accent[0]} {accent[1]}⁾" in out
    assert out.count("━━ row") == 2


def test_tokens_are_those_of_the_batch(
    inspect: Inspect, files: Path, tiny_tokenizer: Tokenizer
) -> None:
    inspect("--data.packing", "true", "--data.max_length", "160")
    prepared = open_prepared(prepared_directory(files))
    row = view_row(prepared, tiny_tokenizer, 0)
    batch = prepared.rows.row(0)
    assert len(row.segments) == 3
    tokens = [token for segment in row.segments for token in segment.tokens]
    ids = [token for each in tokens for token in each.ids]
    assert ids == batch.tokens_BT[batch.segment_ids_BT > 0].tolist()
    labels = [each.is_label for each in tokens for _ in each.ids]
    assert labels[1:] == batch.loss_weights_BT[: len(labels) - 1].tolist() and not labels[0]
    assert sum(segment.num_labels for segment in row.segments) == prepared.rows.num_loss_tokens
    assert row.num_padding == 160 - len(ids)
    for segment in row.segments:
        assert segment.runs() == [
            (False, segment.num_tokens - segment.num_labels),
            (True, segment.num_labels),
        ]


def test_page_escapes_what_comes_from_data(inspect: Inspect, files: Path) -> None:
    page = files / "report.html"
    code, out, _ = inspect("--html", str(page), "--ids")
    assert code == 0 and f"page: {page}" in out
    text = page.read_text("utf-8")
    assert "<script" not in text and "<b>at" not in text and "\x1b" not in text
    shown = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<small>[\d ]+</small>", "", text)))
    assert EVIL in shown and "(an answer has no thought, or an empty one)" in shown
    assert text.count('<section class="card row"') == 3 and text.count("<svg") == 3
    assert "http:" not in text and "https:" not in text and "url(" not in text
    assert not list(files.glob("*.tmp"))


def test_what_is_taught_is_shown(inspect: Inspect, files: Path) -> None:
    """A recipe of one's own, and rows with turns that are not to be learnt."""
    replies = [
        {"role": "assistant", "content": "<think>hm hm hm hm</think>One"},
        {"role": "assistant", "content": "Two, as one and one", "weight": 0},
        {"role": "assistant", "content": "Three", "reasoning": "hm hm hm"},
    ]
    chat = [each for reply in replies for each in ({"role": "user", "content": "?"}, reply)]
    rows = [
        {"task": "Why?", "text": "So it is, and was, and will be."},
        {"messages": chat, "id": 1},
    ]
    (files / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = files / "report.html"
    code, out, err = inspect(
        *("--data.answer_template", "[T]{reasoning}[/T]\n{answer}", "--data.system_prompt", EVIL),
        *("--data.columns", "{prompt: task, response: text}", "--data.earlier_reasoning", "strip"),
        *("--data.without_thought", "drop_system", "--data.max_length", "200"),
        *("--html", str(page)),
    )
    assert (code, err) == (0, "")
    shown = [" ".join(line.split()) for line in out.splitlines()]
    lessons = [
        f"system text {EVIL}",
        "answers [T]{reasoning}[/T]↵{answer}",
        "{reasoning} from [T] to [/T]",
        "{answer} from [/T] to the end",
        "without_thought drop_system: such answers are trained without the system text (1 sample)",
        "earlier_reasoning strip: only the last turn is trained, and sees no earlier reasoning",
        "columns prompt: task, response: text",
        f"{files}/rows.jsonl columns used: messages, task, text; not used: id",
    ]
    assert shown[shown.index("What is taught:") + 1 :][: len(lessons)] == lessons
    assert "⟦[T]hm hm hm[/T]↵\nThree⟨end_of_turn⟩⟧" in out and "hm hm hm hm" not in out
    text = page.read_text("utf-8")
    assert EVIL not in text and all(
        html.escape(each.split(" ", 1)[1]) in text for each in lessons[1:]
    )


def test_a_doubled_bos_fails_and_is_named(
    inspect: Inspect, files: Path, tiny_tokenizer: Tokenizer
) -> None:
    """In front of sample 1, in a set that is whole but for that."""
    inspect()
    directory = prepared_directory(files)
    rows = open_prepared(directory).rows
    at = rows.sample_offsets[1]
    tokens = np.insert(rows.tokens_N, at, tiny_tokenizer.bos_id)
    mask = np.insert(rows.loss_mask_N, at, False)
    offsets = rows.sample_offsets + np.array([0, 0, 1, 1])
    for name, array in (("tokens", tokens), ("loss_mask", mask), ("sample_offsets", offsets)):
        np.save(directory / f"{name}.npy", array)
    rows = PackedRows(T, tokens, mask, offsets, rows.row_samples, rows.row_offsets)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest = sealed(manifest | {"digest": rows.digest()})
    (directory / "manifest.json").write_text(json.dumps(manifest))
    page = files / "report.html"
    code, out, err = inspect("--prepared", str(directory), "--rows", "0", "--html", str(page))
    assert (code, err) == (1, "")
    assert "  FAILED  exactly one <bos>, at its start: not in 1 sample\n" in out
    failure = f"sample 1 ({files}/rows.jsonl:row 3): 2 <bos>, at tokens 0, 1"
    assert f"            {failure}\n" in out
    assert out.count("FAILED") == 1 and out.count("  ok      ") == 4
    text = page.read_text("utf-8")
    assert "1 of 5 checks failed" in text and html.escape(failure) in text


BOS, BEGIN, END, PAD = "<bos>", "<start_of_turn>", "<end_of_turn>", "<pad>"
USER, MODEL = [BEGIN, "u", END, "\n"], [BEGIN, "m", "a", END]
GOOD = [BOS, *USER, *MODEL]
TWICE = [*GOOD, "\n", *USER, *MODEL]


@pytest.mark.parametrize(
    ("tokens", "untrained", "expected"),
    [
        (TWICE, [], {}),
        ([*USER, *MODEL], [], {"one <bos>": "no <bos>"}),
        (["a", *GOOD], [], {"one <bos>": "1 <bos>, at token 1"}),
        ([*GOOD, "\n"], [], {"trained": "ends in token {newline} '\\n'"}),
        (GOOD, [8], {"trained": "its last <end_of_turn> carries no loss"}),
        (TWICE, [8], {"trained": "an earlier <end_of_turn> carries no loss"}),
        (TWICE, [7, 8], {}),  # a turn that is not to be learnt
        ([BOS, *USER, BEGIN, "m", PAD, END], [], {"control": "<pad> at token 7"}),
        ([BOS, *USER, *USER[:3], *MODEL], [], {"control": "3 whole turns"}),
        ([BOS, *USER, BEGIN, "m", *MODEL], [], {"control": "<start_of_turn> at token 7"}),
        (
            [BOS, *USER, BEGIN, "m"],
            [],
            {
                "trained": "ends in token {m} 'm'",
                "control": "1 whole turn and one that is not closed",
            },
        ),
        ([BOS, *USER, BEGIN, "m", -1, END], [], {"vocabulary": "an id outside 0 to {last:,}"}),
    ],
)
def test_checks_bite(
    tokens: list[str | int],
    untrained: list[int],
    expected: dict[str, str],
    tiny_tokenizer: Tokenizer,
) -> None:
    vocabulary = {tiny_tokenizer.decode([i]): i for i in tiny_tokenizer.control_ids}
    vocabulary |= {text: tiny_tokenizer.encode(text)[0] for text in ("u", "m", "a", "\n")}

    def sample(pieces: list[str | int], untrained: list[int]) -> Sample:
        ids = [vocabulary.get(each, each) for each in pieces]
        mask = np.ones(len(ids), bool)
        mask[untrained] = False
        return Sample(np.array(ids, np.int32), mask)

    samples = [sample(GOOD, []), sample(tokens, untrained), sample(GOOD, [])]
    found = survey(by_hand(samples), tiny_tokenizer)
    words = {"newline": vocabulary["\n"], "m": vocabulary["m"]}
    words["last"] = tiny_tokenizer.vocab_size - 1
    failed = [check for check in found.checks if check.num_failed]
    assert len(failed) == len(expected) == found.num_failed
    for check, (name, detail) in zip(failed, expected.items(), strict=True):
        assert name in check.name
        where = f"sample 1 (a.jsonl:row 2): {detail.format(**words)}"
        assert check == SampleCheck(check.name, 1, [where])
    assert found.lengths_S.tolist() == [9, len(tokens), 9]
    # All but the first token and what is marked: nobody predicts a first token.
    assert found.num_labels_S.tolist() == [8, len(tokens) - 1 - len(untrained), 8]


def by_hand(
    samples: list[Sample], start: int = 0, loss_on_prompt: bool = True, **rows_read: int
) -> Prepared:
    """A set of these samples, one a row, from rows that were all kept."""
    rows_read = rows_read or {"a": len(samples)}
    made_from = {"options": {"start": start, "loss_on_prompt": loss_on_prompt}}
    by_source = {f"{name}.jsonl": {"rows_read": n, "samples": n} for name, n in rows_read.items()}
    rows = PackedRows.from_samples(samples, [[i] for i in range(len(samples))], 32)
    numbers = start + np.arange(len(samples))
    report = DataReport(by_source=by_source)
    return Prepared(Path(), rows, report, {"made_from": made_from}, numbers)


def test_slices_change_nothing(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [3, 1, 20, 2, 2, 9]
    samples = [Sample(np.full(n, 5, np.int32), np.arange(n) % 2 == 1) for n in lengths]
    prepared = by_hand(samples)
    whole = survey(prepared, tiny_tokenizer)
    monkeypatch.setattr("jaxsft.inspect.rows._SLICE_TOKENS", 4)
    sliced = survey(prepared, tiny_tokenizer)
    assert sliced.checks == whole.checks
    assert whole.checks[1].num_failed == 6 and len(whole.checks[1].examples) == 5
    assert sliced.num_labels_S.tolist() == whole.num_labels_S.tolist() == [1, 0, 10, 1, 1, 4]
    assert sliced.quantiles() == {
        **{"p1": 1, "p5": 1, "p10": 1, "p50": 2, "p90": 20, "p95": 20, "p99": 20, "max": 20}
    }


def test_loss_outside_of_the_models_turns(tiny_tokenizer: Tokenizer) -> None:
    begin, end = tiny_tokenizer.start_of_turn_id, tiny_tokenizer.end_of_turn_id
    exchange = [begin, 300, end, begin, 301, 302, end]
    ids = np.array([tiny_tokenizer.bos_id, *exchange, *exchange], np.int32)
    mask = np.zeros(15, bool)
    mask[[6, 7, 13, 14]] = True  # the replies and their ends
    spoilt = mask.copy()
    spoilt[[2, 9]] = True  # both questions
    samples = [Sample(ids, mask), Sample(ids, spoilt)]
    name = "no loss outside of the model's turns"
    found = survey(by_hand(samples, loss_on_prompt=False), tiny_tokenizer)
    failed = [check for check in found.checks if check.num_failed]
    assert failed == [SampleCheck(name, 1, ["sample 1 (a.jsonl:row 2): 2 labels elsewhere"])]
    assert survey(by_hand(samples), tiny_tokenizer).num_failed == 0


@pytest.mark.parametrize(
    ("start", "rows_read", "sample", "source"),
    [
        (0, {"a": 2, "b": 2}, 2, "b.jsonl:row 1"),
        (5, {"a": 2, "b": 2}, 1, "a.jsonl:row 7"),
        (5, {"a": 2, "b": 2}, 3, "b.jsonl:row 2"),
        (5, {"a": 0, "b": 2, "c": 2}, 1, "row 7 over all files"),  # a may have 1 to 5 rows
        (5, {"a": 0, "b": 2, "c": 2}, 2, "c.jsonl:row 1"),
    ],
)
def test_source_rows(start: int, rows_read: dict[str, int], sample: int, source: str) -> None:
    samples = [Sample(np.ones(1, np.int32), np.ones(1, bool))] * 4
    assert source_of(by_hand(samples, start, **rows_read), sample) == source


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--row", "3"], "--row 3: the rows are 0 to 2"),
        (["--row", "-1"], "--row -1: the rows are 0 to 2"),
        (["--rows", "-1"], "--rows -1: must not be negative"),
        (["--rows", "x"], "expected a whole number or null, got 'x'"),
        (["--rows", "1", "--row", "1"], "--rows and --row: give one of them"),
        (["--html", "/nowhere/report.html"], "/nowhere/report.html: there is no such directory"),
        (["--html", "/tmp"], "--html /tmp: is a directory"),
        (["--prepared", "/nowhere"], "--prepared /nowhere: no such directory"),
        (["--data.train_files", "/nowhere.jsonl"], "/nowhere.jsonl: cannot be read"),
        (["--ide"], "unknown option 'ide'"),
    ],
)
def test_bad_options(options: list[str], complaint: str, inspect: Inspect) -> None:
    code, _, err = inspect(*options)
    assert code == 2 and complaint in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_damaged_sets(inspect: Inspect, files: Path, tokenizer: Tokenizer) -> None:
    inspect()
    directory = prepared_directory(files)
    (files / "other.model").write_bytes(tokenizer.model_bytes)
    other = ["--model.tokenizer", str(files / "other.model")]
    code, _, err = inspect("--prepared", str(directory), *other)
    assert code == 2 and "made with another tokenizer" in err and err.count("\n") == 1
    tokens = directory / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    code, out, err = inspect("--prepared", str(directory))
    assert (code, out) == (2, "")
    assert err == f"error: {directory}: damaged, or no prepared rows; delete it, to be made again\n"


def test_a_prepared_directory_alone_shows_the_same(inspect: Inspect, files: Path) -> None:
    """With the tokenizer of the config's model."""
    code, first, _ = inspect()
    directory = prepared_directory(files).rename(files / "set")
    again = inspect("--prepared", str(directory), "--data.train_files", "/nowhere.jsonl")
    shown = first.splitlines()[:-1]
    assert (code, again) == (0, (0, "\n".join([*shown, f"in {directory}", ""]), ""))
    assert "⟦<reasoning>Because.</reasoning>↵\n<answer>B</answer>⟨end_of_turn⟩⟧" in first
    manifest = json.loads((directory / "manifest.json").read_text())
    options = manifest["made_from"]["options"]
    for name in ("answer_template", "without_thought", "earlier_reasoning", "columns"):
        del options[name]  # as an earlier version left it
    (directory / "manifest.json").write_text(json.dumps(sealed(manifest)))
    code, out, err = inspect("--prepared", str(directory))
    assert (code, err) == (0, "") and "{answer}" in out and "earlier_reasoning" not in out


def test_prompts_of_grpo(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question": f"{EVIL} 2 + 3?", "answer": "Two and three.\n#### 5"},
        {"text": "Write f.", "test_list": ["assert f(1) == 2", "assert f(2) == 3"], "task_id": 601},
        {"text": "Write g.", "test_list": ["assert g(1) == 2", "assert g(2) == 3"], "task_id": 11},
        {"prompt": "No answer?"},
        {"prompt": "Long " * 999, "answer": "1"},
    ]
    (files / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load((files / "config.yaml").read_text())
    del config["data"]["prepared_dir"], config["data"]["without_thought"]
    config["data"] |= {"max_length": 400, "max_drop": 0.9}
    config |= {"rollout": {"max_new_tokens": 16, "num_prompts": 2}, "max_steps": 3}
    (files / "config.yaml").write_text(yaml.safe_dump(config))
    asked = ["--config", str(files / "config.yaml")]
    assert main([*asked, "--row", "0", "--row", "1"]) == 0
    out, err = capsys.readouterr()
    facts = [" ".join(line.split()) for line in out.splitlines()]
    assert err == "" and "⟨start_of_turn⟩user↵" in out and f"{EVIL} 2 + 3?" in out
    for fact in (
        *("kind number", "answer 5", "kind code", "hidden test assert f(2) == 3"),
        *("kinds number 1, code 1", "passes 3: 6 prompts in max_steps 3"),
        "room 384 tokens: data.max_length 400 without rollout.max_new_tokens 16",
    ):
        assert fact in facts
    assert "1 rejected: not_for_training" in out and "1 rejected: too_long" in out
    assert out.count("1 rejected:") == 3
    for options, complaint in ((["--html", "x.html"], "--html"), (["--row", "9"], "rows are 0 to")):
        assert main([*asked, *options]) == 2
        assert complaint in capsys.readouterr().err
