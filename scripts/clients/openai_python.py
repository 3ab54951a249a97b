from cases import KEY, MODEL, QUESTION, TOOL, URL, Weather, case, main
from openai import BadRequestError, OpenAI, pydantic_function_tool

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
CHAT = [{"role": "user", "content": QUESTION}]
OPTIONS = {"model": MODEL, "temperature": 0, "max_tokens": 200}


@case
def forced_call():
    choice = client.chat.completions.create(
        **OPTIONS, messages=CHAT, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    Weather.model_validate_json(call.function.arguments)


@case
def named_call():
    choice = {"type": "function", "function": {"name": "weather"}}
    reply = client.chat.completions.create(**OPTIONS, messages=CHAT, tools=[TOOL], tool_choice=choice)
    Weather.model_validate_json(reply.choices[0].message.tool_calls[0].function.arguments)


@case
def a_round_of_calls():
    chat = [*CHAT]
    reply = client.chat.completions.create(
        **OPTIONS, messages=chat, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    )
    message = reply.choices[0].message
    chat += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}]
    reply = client.chat.completions.create(**OPTIONS, messages=chat, tools=[TOOL], tool_choice="none")
    assert reply.choices[0].message.content


@case
def free_choice():
    reply = client.chat.completions.create(**OPTIONS, messages=CHAT, tools=[TOOL])
    message = reply.choices[0].message
    assert message.content or message.tool_calls


@case
def streamed_call():
    stream = client.chat.completions.create(
        **OPTIONS, messages=CHAT, tools=[TOOL], tool_choice="required", stream=True, parallel_tool_calls=False
    )
    pieces = [p for chunk in stream for c in chunk.choices for p in c.delta.tool_calls or []]
    assert pieces[0].id
    assert pieces[0].function.name == "weather"
    Weather.model_validate_json("".join(piece.function.arguments for piece in pieces))


@case
def streaming_helper():
    tool = pydantic_function_tool(Weather)
    with client.chat.completions.stream(
        **OPTIONS, messages=CHAT, tools=[tool], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        kinds = {event.type for event in stream}
        reply = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert isinstance(reply.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


@case
def parsed_call():
    tool = pydantic_function_tool(Weather)
    reply = client.chat.completions.parse(
        **OPTIONS, messages=CHAT, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    assert isinstance(reply.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


@case
def parsed_answer():
    reply = client.chat.completions.parse(**OPTIONS, messages=CHAT, response_format=Weather)
    assert isinstance(reply.choices[0].message.parsed, Weather)


@case
def parsed_answer_or_call():
    reply = client.chat.completions.parse(
        **OPTIONS, messages=CHAT, response_format=Weather, tools=[pydantic_function_tool(Weather)]
    )
    message = reply.choices[0].message
    assert message.tool_calls or isinstance(message.parsed, Weather)


@case
def strict_tools_with_free_choice():
    reply = client.chat.completions.parse(**OPTIONS, messages=CHAT, tools=[pydantic_function_tool(Weather)])
    for call in reply.choices[0].message.tool_calls or []:
        assert isinstance(call.function.parsed_arguments, Weather)


@case
def extra_fields_of_vllm():
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "include_reasoning": False}
    reply = client.chat.completions.create(**OPTIONS, messages=CHAT, reasoning_effort="low", extra_body=extra)
    assert reply.choices[0].message.content


@case
def a_bad_choice_is_told():
    told = ""
    try:
        client.chat.completions.create(**OPTIONS, messages=CHAT, tool_choice="required")
    except BadRequestError as error:
        told = str(error)
    assert "tool_choice" in told


@case
def responses_with_a_call():
    tool = {"type": "function", "strict": True, **TOOL["function"]}
    reply = client.responses.create(
        model=MODEL,
        input=QUESTION,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=200,
    )
    [call] = [item for item in reply.output if item.type == "function_call"]
    Weather.model_validate_json(call.arguments)


@case
def streamed_responses():
    with client.responses.stream(model=MODEL, input=QUESTION, max_output_tokens=30) as stream:
        kinds = [event.type for event in stream]
    assert "response.output_text.delta" in kinds
    assert kinds[-1] in ("response.completed", "response.incomplete")


@case
def parsed_response():
    reply = client.responses.parse(model=MODEL, input=QUESTION, text_format=Weather, max_output_tokens=200)
    assert isinstance(reply.output_parsed, Weather)


main("openai")
