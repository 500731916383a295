"""Chat templates by name: what `chat_template: chatml` and its like write, in Jinja, each as its models publish it."""

from __future__ import annotations

from jaxmerge.files.methods import known

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system, turns = messages[0]['content'] + '\\n\\n', messages[1:] %}"
    "{% else %}{% set system, turns = '', messages %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in turns %}"
    "{% if message['role'] != ('user' if loop.index0 is even else 'assistant') %}"
    "{{ raise_exception('after an optional system message, user and assistant must take turns') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
_EXAONE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
_ALPACA = (
    "{% for message in messages if message['role'] == 'system' %}"
    "{% if loop.last %}{{ message['content'] | trim + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% set titles = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} %}"
    "{% for message in messages if message['role'] in titles %}"
    "{{ '### ' + titles[message['role']] + ':\\n' + message['content'] | trim }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}


def check_template(wanted: str) -> None:
    """Raise unless `wanted` is "auto", a name of TEMPLATES, or by its looks a template: with a brace, not short."""
    if "{" not in wanted or len(wanted) < 20:
        known(wanted, ("auto", *TEMPLATES), "chat_template")
