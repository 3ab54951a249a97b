import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, streamText, tool } from "ai";
import { z } from "zod";
import { CHAT, MODEL, URL, check, main } from "./cases.mjs";

const provider = createOpenAICompatible({
  name: "toppings", baseURL: `${URL}/v1`, apiKey: "none", supportsStructuredOutputs: true, includeUsage: true,
});
const options = {
  model: provider(MODEL), prompt: CHAT[0].content, temperature: 0, maxOutputTokens: 200, maxRetries: 0,
};
const Weather = z.object({
  city: z.enum(["Rome", "Paris", "Oslo"]),
  days: z.number().int().min(1).max(9),
  is_metric: z.boolean(),
});
const weather = tool({
  description: "Tells the weather.", inputSchema: Weather, execute: async ({ city }) => `sun in ${city}`,
});
const providerOptions = { toppings: { parallel_tool_calls: false } };
const forced = { ...options, tools: { weather }, toolChoice: "required", providerOptions };

await main("ai", {
  async text() {
    check((await generateText({ ...options, maxOutputTokens: 20 })).text);
  },
  async forced_call() {
    const { toolCalls, toolResults } = await generateText(forced);
    Weather.parse(toolCalls[0].input);
    check(toolResults[0].output.startsWith("sun in"));
  },
  async named_call() {
    const reply = await generateText({ ...forced, toolChoice: { type: "tool", toolName: "weather" } });
    check(reply.toolCalls.length === 1 && reply.finishReason === "tool-calls");
  },
  async streamed_call() {
    const reply = streamText(forced);
    const parts = [];
    for await (const part of reply.fullStream) parts.push(part.type);
    check(parts.includes("tool-input-delta") && parts.includes("tool-call"));
    check((await reply.usage).outputTokens > 0);
  },
  async typed_output() {
    const reply = await generateText({ ...options, output: Output.object({ schema: Weather }) });
    Weather.parse(reply.output);
  },
  async streamed_typed_output() {
    const reply = streamText({ ...options, output: Output.object({ schema: Weather }) });
    for await (const part of reply.partialOutputStream) check(typeof part === "object");
    Weather.parse(await reply.output);
  },
  async no_calls() {
    const reply = await generateText({ ...forced, toolChoice: "none" });
    check(reply.toolCalls.length === 0);
  },
});
