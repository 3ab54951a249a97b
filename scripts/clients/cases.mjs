// What the programs of this folder share: cases that each pass or fail, told as one JSON line.
import { readFileSync } from "node:fs";

export const URL = process.env.TOPPINGS_URL;
export const MODEL = process.env.TOPPINGS_MODEL;
export const CHAT = [{ role: "user", content: "What will the weather be like in Rome?" }];
export const TOOL = {
  type: "function",
  function: {
    name: "weather",
    description: "Tells the weather.",
    parameters: {
      type: "object",
      properties: {
        city: { type: "string", enum: ["Rome", "Paris", "Oslo"] },
        days: { type: "integer", minimum: 1, maximum: 9 },
        is_metric: { type: "boolean" },
      },
      required: ["city", "days", "is_metric"],
      additionalProperties: false,
    },
  },
};

export function check(condition) {
  if (!condition) throw new Error("a condition does not hold");
}

export async function main(name, cases) {
  const outcomes = {};
  for (const [title, run] of Object.entries(cases)) {
    try {
      await run();
      outcomes[title] = "passed";
    } catch (error) {
      outcomes[title] = `${error.name}: ${error.message}`.slice(0, 300);
    }
  }
  const { version } = JSON.parse(readFileSync(`node_modules/${name}/package.json`));
  console.log(JSON.stringify({ packages: { [name]: version }, cases: outcomes }));
}
