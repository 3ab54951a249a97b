import instructor
from cases import KEY, MODEL, QUESTION, URL, Weather, case, main
from openai import AsyncOpenAI, OpenAI

CHAT = [{"role": "user", "content": QUESTION}]
OPTIONS = {"model": MODEL, "temperature": 0, "max_tokens": 200, "max_retries": 0}


def client(mode):
    return instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key=KEY), mode=mode)


@case
def by_a_call():
    reply = client(instructor.Mode.TOOLS).chat.completions.create(
        **OPTIONS, messages=CHAT, response_model=Weather
    )
    assert isinstance(reply, Weather)


@case
def by_a_strict_call():
    reply = client(instructor.Mode.TOOLS_STRICT).chat.completions.create(
        **OPTIONS, messages=CHAT, response_model=Weather
    )
    assert isinstance(reply, Weather)


@case
def by_a_schema():
    reply = client(instructor.Mode.JSON_SCHEMA).chat.completions.create(
        **OPTIONS, messages=CHAT, response_model=Weather
    )
    assert isinstance(reply, Weather)


@case
def partly():
    parts = list(
        client(instructor.Mode.TOOLS).chat.completions.create_partial(
            **OPTIONS, messages=CHAT, response_model=Weather
        )
    )
    assert parts[-1].city


@case
async def asynchronous():
    patched = instructor.from_openai(AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY))
    reply = await patched.chat.completions.create(**OPTIONS, messages=CHAT, response_model=Weather)
    assert isinstance(reply, Weather)


main("instructor")
