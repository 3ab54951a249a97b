"""`/generate` and `/generate_stream`, which two families of servers share and answer differently.

A body with `lora_dir` or `lora_id` gets the LightLLM family's shape (`generated_text` is a list of one); any
other, `parameters.adapter_id` or not, gets LoRAX's (`generated_text` is a string): that is the default.
"""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from toppings.server import lightllm, lorax
from toppings.server.bodies import read_json
from toppings.server.errors import ApiError

router = APIRouter()

LIGHTLLM_SELECTORS = ("lora_dir", "lora_id")


@router.post("/generate")
async def generate(request: Request) -> Response:
    return await _generate(request, is_stream=False)


@router.post("/generate_stream")
async def generate_stream(request: Request) -> Response:
    return await _generate(request, is_stream=True)


async def _generate(request: Request, *, is_stream: bool) -> Response:
    family: Any = lorax
    try:
        body = await _body(request)
        family = lightllm if any(name in body for name in LIGHTLLM_SELECTORS) else lorax
        response: Response = await family.generate(request, body, is_stream=is_stream)
        return response
    except Exception as error:
        rendered: Response = family.error_response(_readable(error))
        return rendered


async def _body(request: Request) -> dict[str, Any]:
    body = await read_json(request)
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


def _readable(error: Exception) -> Exception:
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    return error
