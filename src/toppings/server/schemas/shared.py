"""Refusals, and what several dialects' answers hold."""

from typing import Literal

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int | str = Field(description="the status, or `context_length_exceeded`")


class Error(BaseModel):
    error: ErrorDetail


class Unauthorized(BaseModel):
    error: Literal["Unauthorized"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class Status(BaseModel):
    status: str


class Version(BaseModel):
    version: str
