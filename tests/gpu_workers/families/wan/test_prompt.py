"""Words of Wan: texts are cleaned as the pipeline of the model cleans them, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizer_folders
import wan_models
from diffusers.pipelines.wan import pipeline_wan

from xditd.gpu_workers.families.wan.prompt import ENCODER, TOKENIZER, WanPrompt
from xditd.gpu_workers.models.prompts import PromptInputs
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer
from xditd.ipc.errors import Unsupported

CHANGED = ("a “cat”", "一只猫，水墨画", "cafe\u0301", "a\x07cat", "&amp;amp;amp; a cat")


def tokens(config: Any, *texts: str) -> list[list[int]]:
    tokenizers = {TOKENIZER: BuiltTokenizer("T5Tokenizer", tokenizer_folders.t5_tokenizer())}
    found = WanPrompt().tokenize(config, PromptInputs(texts), tokenizers)
    return found[ENCODER].token_ids.tolist()


@pytest.fixture
def without_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_wan, "is_ftfy_available", lambda: False)


@pytest.mark.usefixtures("without_ftfy")
@pytest.mark.parametrize("config", [wan_models.CONFIGS["image"], wan_models.CONFIGS["VACE"]])
def test_pipelines_that_need_ftfy_have_it_or_plain_texts(config: Any) -> None:
    """diffusers' ``WanPipeline`` goes without it, those of pictures do not run."""
    assert tokens(config, "a  cat &amp; a <b>dog</b>\r\n") == tokens(wan_models.TEXT, "a cat & a <b>dog</b>")
    for text in CHANGED:
        with pytest.raises(
            Unsupported, match=r"^prompt or negative prompt 1: .* the workers lack it: pip install ftfy"
        ) as refused:
            tokens(config, "a cat", text)
        assert "cat”" not in refused.value.detail
        assert tokens(wan_models.TEXT, text)


@pytest.mark.parametrize("config", [wan_models.TEXT, wan_models.CONFIGS["image"], wan_models.CONFIGS["VACE"]])
def test_texts_are_cleaned_as_in_the_pipelines(config: Any) -> None:
    assert tokens(config, "a “cat”", "cafe\u0301", "一只猫，水墨画") == tokens(
        config, 'a "cat"', "caf\u00e9", "一只猫,水墨画"
    )
    assert tokens(config, "caf\u00e9") != tokens(config, "cafe")
