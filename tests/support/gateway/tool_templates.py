"""Chat templates that take tools, each in the manner of a family."""

HERMES = """\
{%- if tools %}
    {{- '<|b|>system\\nTools:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nAnswer <tool_call>{"name": name, "arguments": object}</tool_call><|e|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|b|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|e|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|b|>assistant\\n' }}{%- endif %}
"""
