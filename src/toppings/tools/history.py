"""Earlier calls and their results, as templates want them."""

from toppings.tools.formats import Messages


def with_names(messages: Messages) -> Messages:
    """Each tool's message with the name of the tool whose call it answers, which some templates write."""
    names: dict[str, str] = {}
    named = []
    for message in messages:
        for call in message.get("tool_calls", []):
            names[call["id"]] = call["function"]["name"]
        name = names.get(message.get("tool_call_id", ""))
        is_nameless = message["role"] == "tool" and "name" not in message and name
        named.append({**message, "name": name} if is_nameless else message)
    return named
