"""Refusals, and what several dialects' answers hold."""

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int | str | None = Field(
        description="the status, or a word such as `context_length_exceeded`, `rate_limit_exceeded`"
    )


class Error(BaseModel):
    error: ErrorDetail


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
