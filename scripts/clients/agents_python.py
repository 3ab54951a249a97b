from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from cases import KEY, MODEL, QUESTION, URL, Weather, case, main
from openai import AsyncOpenAI

set_tracing_disabled(True)
FORCED = ModelSettings(temperature=0, max_tokens=200, tool_choice="required", parallel_tool_calls=False)
PLAIN = ModelSettings(temperature=0, max_tokens=200)


@function_tool
def weather(question: Weather) -> str:
    """Tells the weather."""
    return f"sun in {question.city}"


def model(kind=OpenAIChatCompletionsModel):
    return kind(MODEL, AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0))


@case
async def a_tool_is_run():
    agent = Agent(
        "a", model=model(), tools=[weather], model_settings=FORCED, tool_use_behavior="stop_on_first_tool"
    )
    assert "sun in" in (await Runner.run(agent, QUESTION)).final_output


@case
async def a_tool_is_run_streamed():
    agent = Agent(
        "a", model=model(), tools=[weather], model_settings=FORCED, tool_use_behavior="stop_on_first_tool"
    )
    result = Runner.run_streamed(agent, QUESTION)
    assert [event async for event in result.stream_events()]
    assert "sun in" in result.final_output


@case
async def typed_output():
    agent = Agent("a", model=model(), output_type=Weather, model_settings=PLAIN)
    assert isinstance((await Runner.run(agent, QUESTION)).final_output, Weather)


@case
async def typed_output_beside_tools():
    agent = Agent("a", model=model(), tools=[weather], output_type=Weather, model_settings=PLAIN)
    assert isinstance((await Runner.run(agent, QUESTION, max_turns=8)).final_output, Weather)


@case
async def over_responses():
    agent = Agent(
        "a",
        model=model(OpenAIResponsesModel),
        tools=[weather],
        model_settings=FORCED,
        tool_use_behavior="stop_on_first_tool",
    )
    assert "sun in" in (await Runner.run(agent, QUESTION)).final_output


main("openai-agents")
