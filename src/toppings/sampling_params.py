"""How tokens of a request are chosen, and when it stops."""

from dataclasses import dataclass
from enum import StrEnum

from toppings.bad_input import MAX_INT, RequestError, check_unicode, shown

MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_STRUCTURE_CHARS = 2**18
"""Length of a schema, pattern, list of choices or grammar."""
MAX_PROMPT_LOGPROBS = 2**19
"""Log-probabilities of prompts that one request may be told: of each token and its alternatives."""
MAX_BIAS = 100.0
MAX_BIASES = 1024
MAX_ALLOWED_TOKEN_IDS = 2**16
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256


class StructureKind(StrEnum):
    """What an output may be held to, and what `Structure.text` says of it."""

    JSON_OBJECT = "json_object"  # any JSON object; the text is empty
    JSON_SCHEMA = "json_schema"  # JSON that a schema accepts; the schema, as JSON
    REGEX = "regex"  # a text that the pattern matches as a whole; the pattern
    CHOICE = "choice"  # one of some texts; a JSON array of strings
    GRAMMAR = "grammar"  # a text of a context-free language; a grammar in Lark's notation


@dataclass(frozen=True, slots=True)
class Structure:
    """What the whole output must be; it ends where the end-of-sequence token says so, not before.

    Raises RequestError for a kind that there is not, and a text of more than `MAX_STRUCTURE_CHARS`. Whether
    the text means anything is for `toppings.grammar` to say.
    """

    kind: StructureKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in list(StructureKind):
            kinds = ", ".join(StructureKind)
            raise RequestError(f"the structure's kind is {shown(repr(self.kind))}; it must be one of {kinds}")
        if not isinstance(self.text, str):
            raise RequestError(f"the structure's text is {shown(repr(self.text))}; it must be a string")
        if len(self.text) > MAX_STRUCTURE_CHARS:
            raise RequestError(
                f"the {self.kind} has {len(self.text)} characters; it may have at most {MAX_STRUCTURE_CHARS}"
            )
        check_unicode(f"the {self.kind}", self.text)
        if bool(self.text) == (self.kind == StructureKind.JSON_OBJECT):
            raise RequestError(
                f"a structure of kind {self.kind} {'takes no' if self.text else 'needs a'} text"
            )


class Pooling(StrEnum):
    """Which final hidden states a prompt's embedding is made of; its length is 1 in any case."""

    LAST = "last"  # the last token's
    MEAN = "mean"  # the mean of all tokens'


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    `logprobs` is how many alternatives to report beside each chosen token (None: no logprobs at all), and
    `prompt_logprobs` beside each token of the prompt but the first. Beside chosen tokens `logprob_token_ids`,
    if there are any, are reported instead of the likeliest ones, in their order.
    `stop` strings are matched by the front end on text; the engine itself only knows `stop_token_ids`.
    There may be `MAX_STOP_STRINGS` of up to `MAX_STOP_CHARS` characters, and `MAX_STOP_TOKEN_IDS` ids.
    `structure` is what the output is held to: no token is drawn that cannot lead to it.

    `logit_bias`: (token id, what is added to its logit), at most `MAX_BIASES` of -`MAX_BIAS` to `MAX_BIAS`.
    `allowed_token_ids`: only these are drawn, where there are any. `bad_words`, up to `MAX_BAD_WORDS` of
    `MAX_BAD_WORD_CHARS` characters, are told the engine by the front end as `bad_token_ids`: where the output
    ends with all of such a sequence but its last token, that one is not drawn.

    With `max_tokens` 0 the prompt is read and nothing drawn: for `prompt_logprobs`, or for the embedding that
    `pooling` asks for.

    Raises RequestError for a value of another type or outside its range.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    structure: Structure | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        _check_count("max_tokens", self.max_tokens, 0 if self.reads_prompt else 1, MAX_INT)
        _check_count("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_is_open=True)
        _check_count("top_k", self.top_k, 0, MAX_INT)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            _check_count("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _check_count("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_logprob_token_ids()
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {shown(repr(self.ignore_eos))}; it must be true or false")
        if self.prompt_logprobs is not None:
            _check_count("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.pooling is not None:
            self._check_pooling()
        if not isinstance(self.structure, Structure | None):
            raise RequestError(f"structure is {shown(repr(self.structure))}; it must be a Structure")
        if self.structure is not None and self.ignore_eos:
            raise RequestError(
                f"structure ({self.structure.kind}) and ignore_eos were both given; a structured output ends"
                " where it is complete, so leave ignore_eos out"
            )
        self._check_stops()
        self._check_choice()

    @property
    def has_penalty(self) -> bool:
        """What occurred changes what is drawn."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def reads_prompt(self) -> bool:
        """It asks for something of every token of the prompt, so that all of them must be computed."""
        return self.prompt_logprobs is not None or self.pooling is not None

    @property
    def num_top_logprobs(self) -> int:
        """How many of the likeliest tokens are reported with each one that is chosen."""
        return 0 if self.logprob_token_ids else self.logprobs or 0

    def _check_logprob_token_ids(self) -> None:
        _check_length("logprob_token_ids", self.logprob_token_ids, MAX_LOGPROB_TOKEN_IDS, "ids")
        for token_id in self.logprob_token_ids:
            _check_count("logprob_token_ids holds an id that", token_id, 0, MAX_INT)
        if self.logprob_token_ids and self.logprobs is None:
            raise RequestError("logprob_token_ids needs logprobs; give 0 or more")

    def _check_pooling(self) -> None:
        if self.pooling not in list(Pooling):
            kinds = ", ".join(Pooling)
            raise RequestError(f"pooling is {shown(repr(self.pooling))}; it must be one of {kinds}")
        if self.max_tokens or self.prompt_logprobs is not None:
            raise RequestError("pooling goes with max_tokens 0 and without prompt_logprobs")

    def _check_choice(self) -> None:
        """Of what changes which tokens may be drawn."""
        _check_length("logit_bias", self.logit_bias, MAX_BIASES, "biases")
        for token_id, bias in self.logit_bias:
            _check_count("logit_bias holds an id that", token_id, 0, MAX_INT)
            _check_range(f"logit_bias of token {token_id}", bias, -MAX_BIAS, MAX_BIAS)
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise RequestError("logit_bias names a token id twice; give each one bias")
        _check_length("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS, "ids")
        for token_id in _odd_ids(self.allowed_token_ids):
            _check_count("allowed_token_ids holds an id that", token_id, 0, MAX_INT)
        if self.allowed_token_ids and self.structure is not None:
            raise RequestError(
                f"allowed_token_ids and structure ({self.structure.kind}) were both given; the structure says"
                " which tokens are allowed, so leave allowed_token_ids out"
            )
        _check_length("bad_words", self.bad_words, MAX_BAD_WORDS, "words")
        for word in self.bad_words:
            if not 1 <= len(word.lstrip(" ")) <= MAX_BAD_WORD_CHARS:
                raise RequestError(
                    f"bad_words holds {shown(repr(word))}; each needs 1 to {MAX_BAD_WORD_CHARS} characters"
                    " that are no leading spaces"
                )
            check_unicode("bad_words", word)

    def _check_stops(self) -> None:
        _check_length("stop", self.stop, MAX_STOP_STRINGS, "strings")
        for text in self.stop:
            if not isinstance(text, str):
                raise RequestError(f"stop holds {shown(repr(text))}; it must hold strings")
            if not text:
                raise RequestError(
                    "stop holds an empty string; each stop string needs at least one character"
                )
            if len(text) > MAX_STOP_CHARS:
                raise RequestError(
                    f"stop holds a string of {len(text)} characters; each may have at most {MAX_STOP_CHARS}"
                )
            check_unicode("stop", text)
        _check_length("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS, "ids")
        for token_id in self.stop_token_ids:
            _check_count("stop_token_ids holds an id that", token_id, 0, MAX_INT)


def _check_count(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} is {shown(repr(value))}; it must be an integer")
    _check_range(name, value, low, high)


def _odd_ids(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """All of them, unless all are ids: many are looked at in a millisecond so."""
    are_integers = set(map(type, token_ids)) <= {int}
    is_fine = are_integers and (not token_ids or (min(token_ids) >= 0 and max(token_ids) <= MAX_INT))
    return () if is_fine else token_ids


def _check_range(name: str, value: float, low: float, high: float, *, low_is_open: bool = False) -> None:
    if not isinstance(value, int | float):
        raise RequestError(f"{name} is {shown(repr(value))}; it must be a number")
    # Asked so that NaN, which is neither above nor below, is refused too.
    is_above_low = value > low if low_is_open else value >= low
    if not (is_above_low and value <= high):
        bounds = f"{'above' if low_is_open else 'at least'} {low}, at most {high}"
        raise RequestError(f"{name} is {shown(value)}; it must be {bounds}")


def _check_length(name: str, values: tuple[object, ...], most: int, unit: str) -> None:
    if not isinstance(values, tuple | list):
        raise RequestError(f"{name} is {shown(repr(values))}; it must be a list of {unit}")
    if len(values) > most:
        raise RequestError(f"{name} holds {len(values)} {unit}; at most {most} are allowed")
