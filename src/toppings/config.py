"""The frozen settings, their defaults and their YAML; the command line reads both from here."""

from dataclasses import dataclass, field

from toppings.settings import OFF, SWITCH, ConfigError, Settings, coerce, parse_bytes, read_yaml, setting

__all__ = [
    "OFF",
    "SWITCH",
    "Config",
    "ConfigError",
    "EngineConfig",
    "ServerConfig",
    "Settings",
    "coerce",
    "parse_bytes",
    "read_yaml",
    "setting",
]

MODES = ("cached", "on_demand", "pipelined", "cpu_assisted", "cpu_shrink", "auto")
CPU_MODES = ("cpu_assisted", "cpu_shrink")
EVICTION_POLICIES = ("value", "lru")
SCHEDULING_POLICIES = ("fair", "fcfs", "priority")
DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTIZATIONS = ("none", "int8", "int4")
DEVICES = ("cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")
DECODE_LORA_FORMS = ("auto", "mbgmv", "bgmv")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Settings):
    """What an engine needs, with or without a server around it. Sizes in bytes, times in seconds."""

    model: str = setting(
        "",
        "base model: directory of a Hugging Face checkpoint, a .gguf file, a hub's org/name[@revision], an"
        " address (s3://, gs://, https://, http://), or demo (empty: the installed real one, else the demo)",
    )
    served_model_name: str = setting("", "name of the base model in the API (empty: the model's own)")
    load_format: str = setting(
        "auto",
        "base weights: read from the checkpoint, or drawn at random (dummy; an engine by itself, which needs"
        " no tokeniser, then also takes a known name such as llama-2-7b)",
        choices=LOAD_FORMATS,
    )
    dtype: str = setting("auto", "arithmetic of model and adapters (auto: the checkpoint's)", choices=DTYPES)
    quantization: str = setting(
        "none",
        "on a CPU, keep the base model's weights in 8 bits (a scale per output channel) or 4 (a scale and an"
        " offset per group), made from any checkpoint as it is loaded; adapters keep their type",
        choices=QUANTIZATIONS,
    )
    device: str = setting("cpu", "where the model runs", choices=DEVICES)
    cuda_graphs: str = setting(
        "on",
        "on a GPU, replay captured steps, of which a start captures dozens (decode: those without prompts)",
        choices=(*SWITCH, "decode"),
    )
    decode_lora_form: str = setting(
        "auto",
        "on a GPU, how decode steps compute LoRA: each adapter's rows together (mbgmv), or row by row, padded"
        " to the largest rank (bgmv); auto: whichever is faster for this model, timed at start",
        choices=DECODE_LORA_FORMS,
    )
    async_scheduling: str = setting(
        "auto",
        "start a step before the tokens of the one before are known (auto: on a GPU)",
        choices=("auto", *SWITCH),
    )
    speculative_method: str = setting(
        "off",
        "on a CPU, guess a request's next tokens from its prompt and output (ngram): several are computed in"
        " one step, and those kept that the model draws itself",
        choices=("off", "ngram"),
    )
    num_speculative_tokens: int = setting(
        7, "tokens that are guessed at most for one request in one step", at_least=1, at_most=32
    )
    tensor_parallel_size: int = setting(
        1, "processes, each with a GPU, that the model and its adapters are split over", at_least=1
    )
    step_timeout_s: float = setting(
        300.0, "a step that takes longer ends the engine, which is taken to hang (0: no bound)", at_least=0
    )
    heartbeat_timeout_s: float = setting(
        5.0,
        "an engine whose process gives no sign of life for so long is ended; one that is stopped, as the"
        " kernel says, after a second (0: neither)",
        at_least=0,
    )
    num_threads: int = setting(0, "threads for the model on the CPU (0: all cores)", at_least=0)
    mode: str = setting("auto", "what a cold adapter's prefill does", choices=MODES)
    state_dir: str = setting(
        "",
        "registry and packed adapters, of one base model and for one server at a time"
        " (empty: ~/.cache/toppings/<model>-<identity of its weights>)",
    )
    strict_base: str = setting(
        "off", "refuse adapters whose configuration names another base model", choices=SWITCH
    )
    max_model_len: int = setting(0, "longest prompt plus output, in tokens (0: the model's)", at_least=0)
    max_num_seqs: int = setting(64, "requests that may run at once", at_least=1)
    max_num_batched_tokens: int = setting(
        2048, "tokens of one step; longer prompts are prefilled in chunks", at_least=1
    )
    page_size: int = setting(16, "tokens in one page of the key-value cache", at_least=1)
    enable_prefix_caching: str = setting(
        "on",
        "keep pages of the key-value cache after their request, and share them with requests that begin with"
        " the same tokens",
        choices=SWITCH,
    )
    kv_cache_bytes: int = setting(
        0,
        "size of the key-value cache (0: on a GPU what gpu_memory_utilization leaves, else an eighth of the"
        " memory, at most 4 GiB)",
        at_least=0,
    )
    gpu_memory_utilization: float = setting(
        0.9,
        "share of a GPU's memory for weights, adapters, the largest step and the key-value cache",
        above=0,
        at_most=1,
    )
    host_store_bytes: int = setting(2 * 2**30, "bound of the adapters kept in host memory", at_least=1)
    device_pool_bytes: int = setting(512 * 2**20, "bound of the adapters kept on the device", at_least=1)
    eviction: str = setting("value", "which adapter leaves first", choices=EVICTION_POLICIES)
    scheduling_policy: str = setting(
        "fair",
        "whose turn it is: tokens are shared among tenants by their weights, and each tenant's among its"
        " adapters (fair), requests with a lower priority first, then fair (priority), or first come first"
        " served (fcfs)",
        choices=SCHEDULING_POLICIES,
    )
    merged_mode: str = setting(
        "off",
        "keep the adapter that makes nearly all of the work folded into the base model's weights while that"
        " saves time (auto), and serve others by difference",
        choices=("off", "auto"),
    )
    merged_mode_half_life_s: float = setting(
        30.0, "time after which a step counts half as much in the adapters' shares of the work", above=0
    )
    max_adapter_wait_s: float = setting(
        1.0,
        "a request waits this long for room for its adapter before running ones are drained for it",
        at_least=0,
    )
    assist_workers: int = setting(
        0, "CPU processes for cold adapters (0: one per core the model leaves free, at most 16)", at_least=0
    )
    assist_cores: tuple[str, ...] = setting((), "cores of these processes (default: the last ones)")
    link_gbps: float = setting(
        0.0, "emulated host-to-device link on the CPU, in GB/s (0: no emulation)", at_least=0
    )
    generation_config: str = setting(
        "auto",
        "sampling defaults for what a request leaves out: the model's generation_config.json (auto), or"
        " the API's own (none)",
        choices=("auto", "none"),
    )
    seed: int = setting(0, "seed of requests that bring none")
    step_log: str = setting(
        "", "file that gets one JSON record per step (empty: <log-dir>/<mode>/steps.jsonl; off: none)"
    )
    max_log_bytes: int = setting(
        64 * 2**20,
        "size at which a log (steps.jsonl, server.log) is moved to <name>.1 and begun anew (0: no bound)",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(core.isdigit() for core in self.assist_cores):
            raise ConfigError(f"assist_cores is {self.assist_cores}; it must be core numbers")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least max_num_seqs"
            )
        if self.quantization != "none":
            self._check_quantization()
        if self.speculative_method != "off":
            self._check_speculation()
        if self.merged_mode != "off":
            self._check_merged_mode()
        if self.tensor_parallel_size > 1 and self.mode in CPU_MODES:
            raise ConfigError(
                f"mode is {self.mode!r}, but with a tensor_parallel_size of {self.tensor_parallel_size} "
                "there is no CPU assistance; choose cached, on_demand, pipelined or auto"
            )
        if self.tensor_parallel_size > 1 and self.async_scheduling == "on":
            raise ConfigError(
                f"async_scheduling is 'on', but with a tensor_parallel_size of {self.tensor_parallel_size} "
                "steps are taken in turn; choose auto or off"
            )

    def _check_speculation(self) -> None:
        for name, value, fits in (
            ("device", self.device, self.device == "cpu"),
            ("tensor_parallel_size", self.tensor_parallel_size, self.tensor_parallel_size == 1),
            ("async_scheduling", self.async_scheduling, self.async_scheduling != "on"),
        ):
            if not fits:
                raise ConfigError(
                    f"speculative_method is {self.speculative_method!r}, but {name} is {value!r}: so far it "
                    "is for one CPU process whose steps are taken in turn; use off"
                )

    def _check_merged_mode(self) -> None:
        for name, value, fits in (
            ("quantization", self.quantization, self.quantization == "none"),
            ("tensor_parallel_size", self.tensor_parallel_size, self.tensor_parallel_size == 1),
        ):
            if not fits:
                raise ConfigError(
                    f"merged_mode is {self.merged_mode!r}, but {name} is {value!r}: an adapter is folded only"
                    " into whole weights of the model's own type; use off"
                )

    def _check_quantization(self) -> None:
        if self.device != "cpu":
            raise ConfigError(f"quantization {self.quantization} is for CPUs; use none on {self.device}")
        if self.tensor_parallel_size > 1:
            raise ConfigError(
                f"quantization is {self.quantization!r}, but a model that is split is served in its own type;"
                f" use none, or a tensor_parallel_size of 1 (it is {self.tensor_parallel_size})"
            )


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Settings):
    """What the HTTP server adds around an engine."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8080, "port to listen on (0: any free one)", at_least=0, at_most=65535)
    api_key: str = setting(
        "",
        "bearer token asked of every route but health (empty: that of api_key_file, else of the variable"
        " TOPPINGS_API_KEY, else none); others on this machine can see it among the processes",
        is_secret=True,
    )
    api_key_file: str = setting("", "file that holds the bearer token")
    tenants_file: str = setting(
        "", "YAML file of tenants, their rights, limits and keys; read anew when it has changed"
    )
    allowed_origins: tuple[str, ...] = setting(
        (), "web origins whose pages may read answers, such as https://example.com (*: all; default: none)"
    )
    allowed_methods: tuple[str, ...] = setting(("*",), "methods that these pages may use")
    allowed_headers: tuple[str, ...] = setting(("*",), "headers that these pages may send")
    allow_credentials: str = setting("off", "let these pages send cookies", choices=SWITCH)
    adapters: str = setting("", "directory whose sub-directories are registered as adapters at start")
    adapter_roots: tuple[str, ...] = setting((), "directories below which adapters may be loaded over HTTP")
    adapter_source: tuple[str, ...] = setting(
        (),
        "where adapters come from that a request names and nobody has registered: dir:PATH, hub:PATTERN,"
        " s3://..., gs://..., https://... or http://...; after a comma patterns of names it may be asked for",
    )
    source_max_bytes: int = setting(2 * 2**30, "largest adapter that is fetched from a source", at_least=1)
    source_timeout_s: float = setting(120.0, "longest time that fetching an adapter may take", above=0)
    source_refresh_s: float = setting(
        60.0, "how often a source is asked at most whether an adapter of it has a new revision", above=0
    )
    source_cache_bytes: int = setting(
        10 * 2**30,
        "bound of all adapters from sources; the least recently asked for leaves first",
        at_least=1,
    )
    max_body_bytes: int = setting(
        0,
        "largest body of a request (0: 64 bytes for each token of the model's context, at least 4MiB)",
        at_least=0,
    )
    receive_timeout_s: float = setting(
        30.0, "longest wait for a request's head, and for the next part of its body", above=0
    )
    send_timeout_s: float = setting(
        60.0, "how long a client may leave an answer unread before it is dropped", above=0
    )
    strict_fields: str = setting(
        "off", "refuse requests with fields that nobody knows, instead of ignoring those", choices=SWITCH
    )
    tool_call_parser: str = setting(
        "auto",
        "how models write tool calls (auto: as their chat template shows; generic: in a form that a system"
        " message asks for)",
        choices=("auto", "hermes", "llama3_json", "mistral", "mistral_named", "generic"),
    )
    reasoning_parser: str = setting(
        "auto",
        "whether thoughts within <think> are told apart from the answer (auto: where the chat template knows"
        " them; deepseek_r1 and qwen3 mean think)",
        choices=("auto", "none", "think", "deepseek_r1", "qwen3"),
    )
    trust_request_chat_template: str = setting(
        "off", "let requests bring chat templates of their own, run bounded as all are", choices=SWITCH
    )
    max_queue: int = setting(256, "requests that may wait; more are answered 429", at_least=1)
    perf_model_file: str = setting(
        "", "performance model that /stats tells routers (empty: what `profile batches` measured here)"
    )
    max_engine_restarts: int = setting(
        5, "engines that are replaced in a row after they died or hung, before the server ends", at_least=0
    )
    shutdown_timeout_s: float = setting(
        10.0, "seconds that running requests get to finish after SIGTERM", at_least=0
    )
    otlp_traces_endpoint: str = setting(
        "",
        "OTLP receiver that traces are sent to over HTTP, such as http://localhost:4318/v1/traces (needs the"
        " extra otel; empty: no traces)",
    )
    log_dir: str = setting("logs", "logs go to <log-dir>/<mode>/")
    request_log: float = setting(
        1.0,
        "share of requests that have a line in requests.jsonl, by their ids (0: none; of what the server"
        " failed, all have one where it is above 0)",
        at_least=0,
        at_most=1,
    )
    audit_log: str = setting(
        "on", "write a line for each change of adapters, pins and keys to audit.jsonl", choices=SWITCH
    )
    log_level: str = setting("info", "least severe message that is logged", choices=LOG_LEVELS)

    @property
    def asks_for_keys(self) -> bool:
        return bool(self.api_key or self.tenants_file)


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Everything `toppings serve` reads: one flat list of settings in YAML, two dataclasses here."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
