"""vLLM's CPU build as a side of the comparison; runs in vLLM's environment."""

import os
from collections.abc import Sequence
from pathlib import Path

from peers.isa import hold_torch
from peers.side import Side, Tokens

KV_CACHE_GIB = "1"
MAX_RANK = 64
SETTINGS = {"max_model_len": 1024, "enable_prefix_caching": False}


def libraries() -> list[str]:
    """Which of vLLM's builds of its kernels this process has loaded."""
    paths = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/vllm/_C" in line
    }
    return sorted(Path(path).name for path in paths)


def main() -> None:
    side = Side()
    hold_torch()
    job, num_threads = side.job, len(os.sched_getaffinity(0))
    os.environ |= {
        # In this process, so that what holds torch to fewer instructions holds for all of it.
        **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(num_threads)},
        **{"VLLM_CPU_KVCACHE_SPACE": KV_CACHE_GIB, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        # What was compiled for other instructions is not to be found.
        **{"VLLM_CACHE_ROOT": job["state_dir"], "TORCHINDUCTOR_CACHE_DIR": f"{job['state_dir']}/inductor"},
    }
    import torch
    from vllm import LLM, SamplingParams, __version__  # type: ignore[import-not-found,unused-ignore]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found,unused-ignore]

    paths = {Path(path).name: path for path in job["adapters"]}
    lora = {"enable_lora": True, "max_loras": len(paths), "max_lora_rank": MAX_RANK} if paths else {}
    llm = LLM(job["model"], max_num_seqs=job["num_requests"], **SETTINGS, **lora, **job["settings"])
    requests = {name: LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(paths.items())}

    def answer(prompts: Tokens, num_tokens: int, adapters: Sequence[str] | None) -> Tokens:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate(
            [{"prompt_token_ids": each} for each in prompts],
            sampling,
            use_tqdm=False,
            lora_request=[requests[name] for name in adapters] if adapters else None,
        )
        return [list(each.outputs[0].token_ids) for each in outputs]

    side.serve(
        answer,
        version=__version__,
        kernels=libraries(),
        torch=torch.__version__,
        capability=torch.backends.cpu.get_cpu_capability(),
    )


if __name__ == "__main__":
    main()
