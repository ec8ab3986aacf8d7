"""What a checkpoint is served as: as the family of its name says, unless files beside it, or the operator, say more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from quire.config.engine import EngineConfig, PoolingMethod, RunnerKind
from quire.core.errors import ConfigError
from quire.core.pooling import PoolingTask
from quire.models.arch import Arch
from quire.models.checkpoint import Checkpoint
from quire.models.family import Family
from quire.models.model_config import ModelConfig
from quire.models.pooling_families import vectors
from quire.models.pooling_fields import read_classifier_tokens
from quire.models.registry import identify
from quire.models.sentence_transformers import read_modules
from quire.models.source import resolve_tokenizer
from quire.nn.pooling_config import PoolingConfig, TokenChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How the operator wants it. `runner`: `pooling` makes an embedder of a model that generates, as files of
    sentence-transformers beside it do with `auto`. `method`: how embeddings are pooled, whatever those files say.
    `classifier_tokens`: a model that generates judges by how likely the second of these tokens is, rather than the
    first, to come next. `tokenizer`: from the model's directory to that of the tokenizer which makes tokens of these
    texts; it may fetch it, and so is asked only when there are some."""

    runner: RunnerKind = "auto"
    method: PoolingMethod | None = None
    classifier_tokens: tuple[str, str] | None = None
    tokenizer: Callable[[Path], Path] | None = None


DEFAULT_SERVING = Serving()


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """`checkpoint` has the tensors of the modules beside it too; see `HeadLayer.module`."""

    checkpoint: Checkpoint
    family: Family
    arch: Arch


def read_serving(config: EngineConfig) -> Serving:
    """Of `runner`, `pooling_method`, `tokenizer` and `classifier_tokens`, which is `no,yes`. Raises ConfigError."""
    text, method = config.classifier_tokens, config.pooling_method
    if config.runner == "generate" and (text or method):
        raise ConfigError(
            f"runner is 'generate', where {'classifier_tokens' if text else 'pooling_method'} has no effect.",
            param="classifier_tokens" if text else "pooling_method",
            remedy="Leave out one of the two.",
        )
    plain = Serving(runner=config.runner, method=method, tokenizer=partial(resolve_tokenizer, config))
    if text is None:
        return plain
    parts = tuple(text.split(","))
    if len(parts) != 2 or not all(parts):
        raise ConfigError(
            f"classifier_tokens is {text!r}.",
            param="classifier_tokens",
            remedy="It must be two tokens with a comma between them, the one for no first, such as no,yes.",
        )
    return replace(plain, classifier_tokens=(parts[0], parts[1]))


def identify_served(checkpoint: Checkpoint, serving: Serving) -> Served:
    """Raises what `registry.identify` raises, CheckpointError for files of sentence-transformers that cannot be
    followed, and ConfigError for a wish that this model cannot fulfil."""
    file = str(checkpoint.directory / "config.json")
    family, arch = identify(checkpoint.config, file)
    config = ModelConfig(checkpoint.config, file)
    if arch.pooling is not None and serving.runner == "generate":
        raise ConfigError(
            f"{arch.architecture} generates no text.", param="runner", remedy="Take --runner pooling, or leave it out."
        )
    if serving.runner == "generate":
        _check_generates(arch)
        return Served(checkpoint=checkpoint, family=family, arch=arch)
    tokens = serving.classifier_tokens or read_classifier_tokens(config)
    if tokens is not None:
        arch = replace(arch, lm_head=False, pooling=_by_tokens(checkpoint, family, arch, tokens, serving))
    elif arch.pooling is None or arch.pooling.embeds:
        modules = read_modules(checkpoint.directory)
        if arch.pooling is None and modules is None and serving.runner == "auto" and serving.method is None:
            _check_generates(arch)
            return Served(checkpoint=checkpoint, family=family, arch=arch)
        pooling = arch.pooling or vectors(config, arch)
        if modules is not None:
            pooling = modules.applied(pooling, config)
            checkpoint = modules.with_tensors(checkpoint)
        if serving.method is not None:
            pooling = replace(pooling, method=serving.method, tasks=(PoolingTask.EMBED, PoolingTask.TOKEN_EMBED))
        arch = replace(arch, lm_head=False, pooling=pooling)
    if serving.method is not None and arch.pooling is not None and not arch.pooling.embeds:
        raise ConfigError(
            f"pooling_method is {serving.method!r}, but this {arch.architecture} makes no embeddings.",
            param="pooling_method",
            remedy="Leave it out.",
        )
    return Served(checkpoint=checkpoint, family=_with_prefix(family, arch), arch=arch)


def check_wish(checkpoint: Checkpoint, serving: Serving) -> None:
    """Raises ConfigError for a model of transformers' own code that is to make vectors or scores: it generates only."""
    if serving.runner == "pooling" or serving.method is not None or serving.classifier_tokens is not None:
        raise ConfigError(
            f"{checkpoint.directory} is served by transformers' code, which only generates here.",
            param="runner",
            remedy="Leave out runner, pooling_method and classifier_tokens, or take one of docs/supported-models.md.",
        )


def _check_generates(arch: Arch) -> None:
    if not arch.causal:
        raise ConfigError(
            f"The tokens of this {arch.architecture} see those behind them too: it generates no text.",
            param="runner",
            remedy="Take --runner pooling to get vectors.",
        )


def _with_prefix(family: Family, arch: Arch) -> Family:
    """Checkpoints without a head often name the blocks as if nothing were around them."""
    name = family.names_of(arch).get("embedding")
    if family.optional_prefix or not isinstance(name, str):
        return family
    return replace(family, optional_prefix=name.partition(".")[0] + ".")


def _by_tokens(
    checkpoint: Checkpoint, family: Family, arch: Arch, tokens: tuple[str, str], serving: Serving
) -> PoolingConfig:
    names = family.names_of(arch)
    head = names.get("embedding" if arch.tie_word_embeddings else "head")
    if not isinstance(head, str) or arch.head_bias or not arch.causal:
        raise ConfigError(
            f"{arch.architecture} has no head whose rows could judge for single tokens.",
            param="classifier_tokens",
            remedy="Leave it out.",
        )
    directory = checkpoint.directory if serving.tokenizer is None else serving.tokenizer(checkpoint.directory)
    no, yes = _token_ids(directory, arch, tokens)
    return PoolingConfig(
        tasks=(PoolingTask.CLASSIFY, PoolingTask.SCORE),
        method="last",
        hidden_size=arch.output_size,
        activation="sigmoid",
        labels=(tokens[1],),
        pair="template",
        choice=TokenChoice(
            head=head,
            vocab_size=arch.vocab_size,
            no=no,
            yes=yes,
            multiplier=arch.logit_multiplier,
            softcap=arch.logit_softcap,
        ),
    )


def _token_ids(directory: Path, arch: Arch, tokens: tuple[str, str]) -> list[int]:
    from quire.text.tokenizer import Tokenizer  # a library that other models' engines need not load

    tokenizer = Tokenizer.load(directory)
    found = []
    for text in tokens:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1 or ids[0] >= arch.vocab_size:
            raise ConfigError(
                f"The tokenizer makes {len(ids)} tokens of {text!r}, or one that the model does not have.",
                param="classifier_tokens",
                remedy="Name single tokens of its vocabulary.",
            )
        found.append(ids[0])
    return found
