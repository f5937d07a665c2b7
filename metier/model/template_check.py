"""Does a checkpoint's chat template end, in a little time and memory? Asked once, before it is used in this process.

A template is a program of whoever made the checkpoint. Jinja's sandbox keeps it from files and attributes, not from
looping for hours or building gigabytes. A child process with Jinja alone renders one short exchange under 2 seconds
of processor time and 64 MB.

Limits: a template that is harmless on a short exchange and not on another passes; a server renders every request
under such caps. The memory cap needs Linux.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys

from metier.errors import ModelError

WALL_SECONDS = 60
# What transformers adds to Jinja: loop controls, tojson, raise_exception, strftime_now, and tags that mark answers.
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
CHILD = """
import json, sys, time
import jinja2, jinja2.sandbox
try:
    import resource
    pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + (64 << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
except (ImportError, OSError):
    pass
def refuse(message):
    raise jinja2.TemplateError(message)
environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
environment.globals.update(raise_exception=refuse, strftime_now=time.strftime)
messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
try:
    text = sys.stdin.read()
    environment.from_string(text).render(
        messages=messages, add_generation_prompt=False, bos_token="<s>", eos_token="</s>", enable_thinking=False)
except jinja2.TemplateError:
    pass
except MemoryError:
    sys.exit(3)
except Exception:
    sys.exit(4)
"""


@functools.lru_cache(maxsize=64)
def check_template(template: str) -> None:
    """Raises `ModelError` for a template that takes too long or too much memory, or that cannot be run at all."""
    # -I: neither the current folder nor the environment can put another jinja2 in the way.
    try:
        code = subprocess.run(
            [sys.executable, "-I", "-c", CHILD], input=GENERATION.sub("", template).encode(errors="replace"),
            capture_output=True, timeout=WALL_SECONDS,
        ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
        code = -1
    if code:
        why = {3: "takes more than 64 MB", 4: "cannot be run"}.get(code, "takes more than 2 seconds")
        raise ModelError(
            f"the model's chat template {why} for a short exchange", hint="is it the genuine one? fetch the model again"
        )
