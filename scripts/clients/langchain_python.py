from cases import KEY, MODEL, QUESTION, URL, Weather, case, main
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    base_url=f"{URL}/v1", api_key=KEY, model=MODEL, temperature=0, max_tokens=200, max_retries=0
)


@tool(args_schema=Weather)
def weather(city: str, days: int, is_metric: bool) -> str:
    """Tells the weather."""
    return f"{days} days of sun in {city}"


@case
def bound_tools():
    answer = model.bind_tools([weather], tool_choice="any", parallel_tool_calls=False).invoke(QUESTION)
    [call] = answer.tool_calls
    Weather.model_validate(call["args"])


@case
def a_round_of_calls():
    bound = model.bind_tools([weather], tool_choice="weather")
    answer = bound.invoke(QUESTION)
    result = weather.invoke(answer.tool_calls[0])
    assert isinstance(result, ToolMessage)
    assert model.invoke([HumanMessage(QUESTION), answer, result]).content


@case
def streamed_tools():
    whole = None
    for chunk in model.bind_tools([weather], tool_choice="weather").stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    Weather.model_validate(whole.tool_calls[0]["args"])


@case
def structured_by_a_call():
    assert isinstance(
        model.with_structured_output(Weather, method="function_calling").invoke(QUESTION), Weather
    )


@case
def structured_by_a_schema():
    assert isinstance(model.with_structured_output(Weather, method="json_schema").invoke(QUESTION), Weather)


@case
async def asynchronous():
    answer = await model.bind_tools([weather], tool_choice="weather").ainvoke(QUESTION)
    assert answer.tool_calls


@case
def a_batch():
    assert len(model.bind_tools([weather], tool_choice="any").batch([QUESTION] * 3)) == 3


main("langchain-openai", "langchain-core")
