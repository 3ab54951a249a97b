import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { CHAT, MODEL, TOOL, URL, check, main } from "./cases.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "none", maxRetries: 0 });
const options = { model: MODEL, temperature: 0, max_tokens: 200, messages: CHAT };
const forced = { ...options, tools: [TOOL], tool_choice: "required", parallel_tool_calls: false };
const Weather = z.object({
  city: z.enum(["Rome", "Paris", "Oslo"]),
  days: z.number().int().min(1).max(9),
  is_metric: z.boolean(),
});

await main("openai", {
  async forced_call() {
    const { choices } = await client.chat.completions.create(forced);
    check(choices[0].finish_reason === "tool_calls");
    Weather.parse(JSON.parse(choices[0].message.tool_calls[0].function.arguments));
  },
  async streamed_call() {
    const stream = client.chat.completions.stream(forced);
    const reply = await stream.finalChatCompletion();
    Weather.parse(JSON.parse(reply.choices[0].message.tool_calls[0].function.arguments));
  },
  async a_round_of_calls() {
    const message = (await client.chat.completions.create(forced)).choices[0].message;
    const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "21 degrees" };
    const messages = [...CHAT, message, result];
    const reply = await client.chat.completions.create({ ...options, messages, tools: [TOOL] });
    check(reply.choices[0].message);
  },
  async parsed_call() {
    const tools = [zodFunction({ name: "weather", parameters: Weather })];
    const reply = await client.chat.completions.parse({ ...forced, tools });
    Weather.parse(reply.choices[0].message.tool_calls[0].function.parsed_arguments);
  },
  async parsed_answer() {
    const response_format = zodResponseFormat(Weather, "weather");
    const reply = await client.chat.completions.parse({ ...options, response_format });
    Weather.parse(reply.choices[0].message.parsed);
  },
  async responses_with_a_call() {
    const tools = [{ type: "function", strict: true, ...TOOL.function }];
    const reply = await client.responses.create({
      model: MODEL, input: CHAT[0].content, tools, tool_choice: "required", max_output_tokens: 200,
    });
    const call = reply.output.find((item) => item.type === "function_call");
    Weather.parse(JSON.parse(call.arguments));
  },
});
