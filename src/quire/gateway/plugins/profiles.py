"""Profile handlers and deciders: which profiles run, and what their results mean together.

Definitions: llm-d-router, …/scheduling/profilehandler. Disaggregation is announced in headers, which the decoding
endpoint (or its sidecar) acts upon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, Literal

from quire.core.errors import ConfigError
from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Conclusion, Decider, Parameters, ProfileHandler, Services
from quire.gateway.plugins.affinity_scorers import NO_MATCH, matches_of
from quire.gateway.request import InferenceRequest

PREFILLER: Final = "x-prefiller-host-port"
ENCODERS: Final = "x-encoder-hosts-ports"
DATA_PARALLEL: Final = "x-data-parallel-host-port"
_PORT: Final = {"primaryPort": "a request goes to the port of the endpoint that was chosen"}


class SingleProfile(ProfileHandler):
    """`single-profile-handler`: the one profile."""

    max_profiles = 1

    def next_profiles(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, Sequence[Endpoint]]
    ) -> Sequence[str]:
        return () if results else profiles[:1]

    def conclude(self, request: InferenceRequest, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
        return Conclusion(next(iter(results.values()), ()))


class StageNames(Parameters, frozen=True):
    decode: str = "decode"
    prefill: str = "prefill"
    encode: str = "encode"
    fallback: str = ""


class StageDeciders(Parameters, frozen=True):
    prefill: str = ""
    encode: str = ""


class DisaggParameters(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = _PORT
    stage_order: Literal["decode-first", "prefill-first"] = "decode-first"
    profiles: StageNames = StageNames()
    deciders: StageDeciders = StageDeciders()
    decode_profile: str = ""
    prefill_profile: str = ""
    decider_plugin_name: str = ""
    """These three are of the older `pd-profile-handler`."""


class Disaggregated(ProfileHandler):
    """`disagg-profile-handler`: decode first; then, where their deciders say so for this request, encode and prefill,
    on endpoints of their own. Where decode, or a prefill that was decided for, finds nobody, the fallback profile runs
    if there is one; without it the request is served whole where it decodes."""

    def __init__(self, names: StageNames, prefill: Decider | None, encode: Decider | None) -> None:
        self._names = names
        self._stages = [(names.encode, encode), (names.prefill, prefill)]

    def required_profiles(self, profiles: Sequence[str]) -> Sequence[str]:
        decided = [name for name, decider in self._stages if decider is not None]
        return [self._names.decode, *decided, *filter(None, (self._names.fallback,))]

    def used_profiles(self, profiles: Sequence[str]) -> Sequence[str]:
        return self.required_profiles(profiles)

    def next_profiles(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, Sequence[Endpoint]]
    ) -> Sequence[str]:
        names = self._names
        if names.decode not in results:
            return [names.decode] if names.decode in profiles else ()
        if names.fallback in results:
            return ()
        decode = results[names.decode]
        if not decode or not results.get(names.prefill, decode):
            return [names.fallback] if names.fallback in profiles else ()
        return [
            name
            for name, decider in self._stages
            if decider is not None
            and name in profiles
            and name not in results
            and len(results) == 1
            and decider.disaggregate(request, decode[0])
        ]

    def conclude(self, request: InferenceRequest, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
        if self._names.fallback in results:
            return Conclusion(results[self._names.fallback])
        return staged(self._names, results)


class PrefillFirst(ProfileHandler):
    """`disagg-profile-handler` with `stageOrder: prefill-first`: prefill always runs, encode where its decider says so,
    decode last."""

    def __init__(self, names: StageNames, encode: Decider | None) -> None:
        self._names = names
        self._encode = encode

    def required_profiles(self, profiles: Sequence[str]) -> Sequence[str]:
        encode = () if self._encode is None else (self._names.encode,)
        return [self._names.prefill, *encode, self._names.decode]

    def used_profiles(self, profiles: Sequence[str]) -> Sequence[str]:
        return self.required_profiles(profiles)

    def next_profiles(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, Sequence[Endpoint]]
    ) -> Sequence[str]:
        names = self._names
        if names.prefill in profiles and names.prefill not in results:
            return [names.prefill]
        first = results.get(names.prefill)
        encode = names.encode in profiles and names.encode not in results and names.decode not in results
        if first and encode and self._encode is not None and self._encode.disaggregate(request, first[0]):
            return [names.encode]
        return [names.decode] if names.decode in profiles and names.decode not in results else ()

    def conclude(self, request: InferenceRequest, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
        return staged(self._names, results)


def staged(names: StageNames, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
    """To who decodes, with headers that name who prefills and encodes."""
    conclusion = Conclusion(results.get(names.decode, ()))
    prefill, encode = results.get(names.prefill), results.get(names.encode)
    if prefill:
        conclusion.headers[PREFILLER] = prefill[0].address
    if encode:
        conclusion.headers[ENCODERS] = ",".join(endpoint.address for endpoint in encode)
    return conclusion


class DataParallel(ProfileHandler):
    """`data-parallel-profile-handler`: the chosen rank's address goes into a header as well."""

    max_profiles = 1

    def next_profiles(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, Sequence[Endpoint]]
    ) -> Sequence[str]:
        return () if results else profiles[:1]

    def conclude(self, request: InferenceRequest, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
        chosen = next(iter(results.values()), ())
        if not chosen:
            return Conclusion(())
        return Conclusion(chosen, {DATA_PARALLEL: chosen[0].address})


class HeaderProfileParameters(Parameters, frozen=True):
    header_name: str = "EPP-Profile"
    default_profile: str = "decode"


class ByHeader(ProfileHandler):
    """`header-profile-handler`: the profile that the header names, without it the default; the only one if there is
    but one. A profile that is not there serves nobody."""

    def __init__(self, header: str, default: str) -> None:
        self._header = header.strip().lower()
        self._default = default.strip()

    def required_profiles(self, profiles: Sequence[str]) -> Sequence[str]:
        return () if len(profiles) == 1 else (self._default,)

    def next_profiles(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, Sequence[Endpoint]]
    ) -> Sequence[str]:
        if results:
            return ()
        if len(profiles) == 1:
            return profiles
        named = request.headers.get(self._header, "").strip() or self._default
        return [named] if named in profiles else ()

    def conclude(self, request: InferenceRequest, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
        return Conclusion(next(iter(results.values()), ()))


class PrefixDeciderParameters(Parameters, frozen=True):
    non_cached_tokens: int = 0
    prompt_tokens: int = 0
    prefix_match_info_producer_name: str = ""


class PrefixBasedDecider(Decider):
    """`prefix-based-pd-decider`: if at least so many tokens of the prompt are not cached where it would decode, and the
    prompt has at least so many; 0 uncached tokens: never."""

    def __init__(self, parameters: PrefixDeciderParameters) -> None:
        self._least = parameters.non_cached_tokens
        self._prompt = parameters.prompt_tokens
        self._producer = parameters.prefix_match_info_producer_name

    def disaggregate(self, request: InferenceRequest, endpoint: Endpoint) -> bool:
        if not self._least or request.prompt_tokens < self._prompt:
            return False
        cached = matches_of(request, self._producer).get(endpoint.key, NO_MATCH).tokens
        return request.prompt_tokens - cached >= self._least


class Always(Decider):
    """`always-disagg-pd-decider`"""

    def disaggregate(self, request: InferenceRequest, endpoint: Endpoint) -> bool:
        return True


class AlwaysMultimodal(Decider):
    """`always-disagg-multimodal-decider`: for what has images, sounds or films in it."""

    _KINDS = (b'"image_url"', b'"input_image"', b'"video_url"', b'"input_audio"')

    def disaggregate(self, request: InferenceRequest, endpoint: Endpoint) -> bool:
        return any(kind in request.body for kind in self._KINDS)


def _decider(name: str, services: Services, handler: str) -> Decider | None:
    if not name:
        return None
    found = services.plugin(name)
    if not isinstance(found, Decider):
        raise ConfigError(f"{handler}: the plugin {name!r} is no decider.", param="plugins", remedy="Name one.")
    return found


class DataParallelParameters(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = _PORT


def make_disaggregated(parameters: DisaggParameters, services: Services) -> ProfileHandler:
    """Also of the older `pd-profile-handler`, whose parameters are flat."""
    names = StageNames(
        decode=parameters.decode_profile or parameters.profiles.decode,
        prefill=parameters.prefill_profile or parameters.profiles.prefill,
        encode=parameters.profiles.encode,
        fallback=parameters.profiles.fallback,
    )
    prefill = parameters.deciders.prefill or parameters.decider_plugin_name
    handler = "disagg-profile-handler"
    if names.fallback and names.fallback in (names.decode, names.prefill, names.encode):
        raise ConfigError(
            f"{handler}: profiles.fallback is {names.fallback!r}, which is a stage's.",
            param="plugins",
            remedy="Give the fallback a profile of its own.",
        )
    encode = _decider(parameters.deciders.encode, services, handler)
    if parameters.stage_order == "decode-first":
        return Disaggregated(names, _decider(prefill, services, handler), encode)
    if prefill or names.fallback:
        raise ConfigError(
            f"{handler}: with stageOrder prefill-first there is neither deciders.prefill nor profiles.fallback.",
            param="plugins",
            remedy="Remove them, or order decode-first.",
        )
    return PrefillFirst(names, encode)
