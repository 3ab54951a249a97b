from anthropic import Anthropic
from cases import KEY, MODEL, PARAMETERS, QUESTION, URL, Weather, case, main

client = Anthropic(base_url=URL, api_key=KEY, max_retries=0)
CHAT = [{"role": "user", "content": QUESTION}]
TOOLS = [{"name": "weather", "description": "Tells the weather.", "input_schema": PARAMETERS}]
OPTIONS = {"model": MODEL, "max_tokens": 200}


@case
def text():
    assert client.messages.create(**OPTIONS, messages=CHAT).content[0].text


@case
def forced_call():
    reply = client.messages.create(
        **OPTIONS,
        messages=CHAT,
        tools=TOOLS,
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    [call] = [block for block in reply.content if block.type == "tool_use"]
    assert reply.stop_reason == "tool_use"
    Weather.model_validate(call.input)


@case
def a_round_of_calls():
    choice = {"type": "tool", "name": "weather"}
    reply = client.messages.create(**OPTIONS, messages=CHAT, tools=TOOLS, tool_choice=choice)
    call = reply.content[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees"}
    chat = [*CHAT, {"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**OPTIONS, messages=chat, tools=TOOLS).stop_reason


@case
def streamed_call():
    choice = {"type": "tool", "name": "weather"}
    with client.messages.stream(**OPTIONS, messages=CHAT, tools=TOOLS, tool_choice=choice) as stream:
        message = stream.get_final_message()
    Weather.model_validate(message.content[-1].input)


@case
def counted():
    assert client.messages.count_tokens(model=MODEL, messages=CHAT, tools=TOOLS).input_tokens > 10


main("anthropic")
