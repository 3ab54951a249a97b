import litellm
from cases import KEY, MODEL, QUESTION, TOOL, URL, Weather, case, main

litellm.suppress_debug_info = True
CHAT = [{"role": "user", "content": QUESTION}]
OPTIONS = {"api_base": f"{URL}/v1", "api_key": KEY, "temperature": 0, "max_tokens": 200, "num_retries": 0}


def ask(provider="openai", **options):
    return litellm.completion(model=f"{provider}/{MODEL}", messages=CHAT, **{**OPTIONS, **options})


@case
def forced_call():
    reply = ask(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    Weather.model_validate_json(reply.choices[0].message.tool_calls[0].function.arguments)
    assert reply.choices[0].finish_reason == "tool_calls"


@case
def as_vllm():
    reply = ask("hosted_vllm", tools=[TOOL], tool_choice="required")
    Weather.model_validate_json(reply.choices[0].message.tool_calls[0].function.arguments)


@case
def streamed_call():
    chunks = list(ask(tools=[TOOL], tool_choice="required", stream=True, parallel_tool_calls=False))
    reply = litellm.stream_chunk_builder(chunks, messages=CHAT)
    Weather.model_validate_json(reply.choices[0].message.tool_calls[0].function.arguments)


@case
def a_round_of_calls():
    message = ask(tools=[TOOL], tool_choice="required", parallel_tool_calls=False).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}
    reply = litellm.completion(
        model=f"openai/{MODEL}", messages=[*CHAT, message.model_dump(), result], tools=[TOOL], **OPTIONS
    )
    assert reply.choices[0].message


@case
def answer_by_a_schema():
    Weather.model_validate_json(ask("hosted_vllm", response_format=Weather).choices[0].message.content)


@case
async def asynchronous():
    reply = await litellm.acompletion(model=f"openai/{MODEL}", messages=CHAT, **OPTIONS)
    assert reply.choices[0].message.content


main("litellm")
