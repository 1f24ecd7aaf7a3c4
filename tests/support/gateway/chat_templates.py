"""Chat templates in the manner of the well-known families, each with what makes its family hard."""

# Plain turns between markers; a default system turn.
CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Begins with bos_token, trims, asks which variables are there, writes the date.
HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- else %}
        {%- set date_string = "2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: tools\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception('No tools here.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Refuses roles that do not alternate; blocks on lines of their own, which trim_blocks and lstrip_blocks take away.
INSTRUCT = """\
{% if messages[0]["role"] == "system" %}
    {% set system_message = messages[0]["content"] %}
    {% set loop_messages = messages[1:] %}
{% else %}
    {% set loop_messages = messages %}
{% endif %}
{% set ns = namespace() %}
{% set ns.index = 0 %}
{{ bos_token }}
{% for message in loop_messages %}
    {% if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{ raise_exception("After the optional system message, roles must alternate user/assistant/...") }}
    {% endif %}
    {% set ns.index = ns.index + 1 %}
    {% if message["role"] == "user" %}
        {% if loop.last and system_message is defined %}
[INST] {{ system_message ~ "\\n\\n" ~ message["content"] }}[/INST]
        {% else %}
[INST] {{ message["content"] }}[/INST]
        {% endif %}
    {% elif message["role"] == "assistant" %}
        {% generation %}
 {{ message["content"]|trim }}{{ eos_token }}
        {% endgeneration %}
    {% else %}
        {{ raise_exception("Only user and assistant roles are supported, after an initial system message!") }}
    {% endif %}
{% endfor %}
"""

# Looks backwards through the turns, cuts thoughts away, breaks out of loops, writes JSON.
THINKING = """\
{%- macro turn(role, content) -%}
    {{- '<|im_start|>' ~ role ~ '\\n' ~ content ~ '<|im_end|>\\n' -}}
{%- endmacro -%}
{%- set ns = namespace(last_query=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.last_query = index %}
        {%- set ns.found = true %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages if message.content is string %}
    {%- if message.role == "system" and not loop.first %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == "assistant" and '</think>' in message.content %}
        {%- set thought = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last_query %}
            {{- turn(message.role, '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content) }}
        {%- else %}
            {{- turn(message.role, content) }}
        {%- endif %}
    {%- else %}
        {{- turn(message.role, message.content) }}
    {%- endif %}
{%- endfor %}
{{- {"turns": messages|length, "roles": messages|map(attribute="role")|list, "mark": "<&>'é"}|tojson }}
{{- messages|tojson(indent=2) }}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

ALL = {"chatml": CHATML, "headers": HEADERS, "instruct": INSTRUCT, "thinking": THINKING}
