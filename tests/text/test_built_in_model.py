from __future__ import annotations

from pathlib import Path

import quire
from quire.core.sampling import SamplingParams
from quire.text.defaults import eos_token_ids, generation_defaults
from quire.text.stream import TextStream
from quire.text.template import ChatTemplate
from quire.text.tokenizer import Tokenizer

DIRECTORY = Path(quire.__file__).parent / "assets" / "quire_tiny"


def test_the_built_in_models_text_files():
    tokenizer = Tokenizer.load(DIRECTORY)
    template = ChatTemplate.load(DIRECTORY)
    assert template is not None
    text = template.render([{"role": "user", "content": "What is 12 + 30? 😀"}])
    template.close()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    stream = TextStream(tokenizer, SamplingParams(skip_special_tokens=False))
    assert "".join(stream.push([token_id]).text for token_id in ids) == text
    assert eos_token_ids(DIRECTORY)
    SamplingParams(**generation_defaults(DIRECTORY))
