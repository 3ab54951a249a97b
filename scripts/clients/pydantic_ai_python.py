from cases import KEY, MODEL, QUESTION, URL, Weather, case, main
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))
SETTINGS = ModelSettings(temperature=0, max_tokens=200, parallel_tool_calls=False)


@case
async def text():
    result = await Agent(model, model_settings={**SETTINGS, "max_tokens": 20}).run(QUESTION)
    assert result.output


@case
async def output_by_a_call():
    result = await Agent(model, output_type=ToolOutput(Weather), model_settings=SETTINGS).run(QUESTION)
    assert isinstance(result.output, Weather)


@case
async def output_by_a_schema():
    result = await Agent(model, output_type=NativeOutput(Weather), model_settings=SETTINGS).run(QUESTION)
    assert isinstance(result.output, Weather)


@case
async def output_of_two_kinds():
    class Refusal(Weather):
        """Nothing is known of the weather."""

    agent = Agent(model, output_type=[Weather, Refusal], model_settings=SETTINGS)
    assert isinstance((await agent.run(QUESTION)).output, Weather)


@case
async def streamed_output():
    agent = Agent(model, output_type=Weather, model_settings=SETTINGS)
    async with agent.run_stream(QUESTION) as result:
        assert isinstance(await result.get_output(), Weather)


@case
async def a_second_turn():
    agent = Agent(model, output_type=Weather, model_settings=SETTINGS)
    first = await agent.run(QUESTION)
    second = await agent.run("And tomorrow?", message_history=first.all_messages())
    assert isinstance(second.output, Weather)


main("pydantic-ai-slim")
