"""Short chat templates in the forms of the families that write tool calls, as real checkpoints have them."""

QWEN = """\
{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}Functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer with <tool_call>
{"name": ..., "arguments": ...}
</tool_call> to call one.<|im_end|>
{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif not (tools and loop.first and m.role == 'system') -%}
<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}
{%- for call in m.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% endif -%}
{%- endif -%}
"""

LLAMA = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>
{%- elif m.tool_calls -%}
{%- if m.tool_calls | length != 1 -%}{{ raise_exception('one call at a time') }}{%- endif -%}
<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ m.tool_calls[0].function.name }}", "parameters": \
{{- m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>
{%- else -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if tools and loop.last -%}
Functions, to be called with {"name": ..., "parameters": ...}:
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}
{%- endif -%}
{{ m.content }}<|eot_id|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""

MISTRAL = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.last -%}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif -%}
[INST] {{ m.content }}[/INST]
{%- elif m.tool_calls -%}
[TOOL_CALLS] [
{%- for call in m.tool_calls -%}
{%- if call.id | length != 9 -%}{{ raise_exception('ids have nine characters') }}{%- endif -%}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, \
"id": "{{ call.id }}"}{{ '' if loop.last else ', ' }}
{%- endfor -%}
]{{ eos_token }}
{%- elif m.role == 'tool' -%}
{%- if m.tool_call_id | length != 9 -%}{{ raise_exception('ids have nine characters') }}{%- endif -%}
[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- else -%}
{{ ' ' + m.content }}{{ eos_token }}
{%- endif -%}
{%- endfor -%}
"""

MISTRAL_NAMED = MISTRAL.replace("[TOOL_CALLS] [", "{% set form = '[TOOL_CALLS]name[ARGS]{}' %}[TOOL_CALLS] [")

PLAIN = """\
{%- for m in messages -%}
<|{{ m.role }}|>{{ m.content }}</s>
{% endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{% endif -%}
"""

FAMILIES = {
    "hermes": QWEN,
    "llama3_json": LLAMA,
    "mistral": MISTRAL,
    "mistral_named": MISTRAL_NAMED,
    "generic": PLAIN,
}
"""By the name of the format that is found for them."""
