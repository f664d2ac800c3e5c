"""Prepares the rows of a config and says what became of them."""

from jaxsft.common.console import make_console
from jaxsft.config import TrainConfig
from jaxsft.prepare.report import show_data
from jaxsft.prepare.rows import load_data, run_model
from jaxsft.weights.find import open_tokenizer


def prepare_rows(config: TrainConfig) -> int:
    """Prepares what is missing; returns the exit code. ValueError and OSError are bad input."""
    console = make_console()
    tokenizer = open_tokenizer(run_model(config.model).tokenizer)
    data = load_data(config.data, tokenizer, console)
    show_data(console, data.train, data.heldout)
    for prepared in filter(None, (data.train, data.heldout)):
        console.print(f"in {prepared.directory}")
    return 0
