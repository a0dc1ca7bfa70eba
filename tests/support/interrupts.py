"""KeyboardInterrupt at any line of the package, and what it may leave behind."""

import dis
import functools
import sys

import rgtg_fast
from rgtg_fast.scorers import turns


@functools.cache
def _leaving(code):
    """Where in `code` a `with` begins to call its `__exit__`.

    Python looks for signals after calls and at jumps backward, so that no Ctrl-C comes between the
    last line of a `with` and that call. A trace function can raise there: the lock would be held
    for good, and the next call would wait for ever.
    """
    instructions = list(dis.get_instructions(code))
    triples = zip(instructions, instructions[1:], instructions[2:], strict=False)
    return {
        first.offset
        for first, *others in triples
        if all(i.opname == "LOAD_CONST" and i.argval is None for i in (first, *others))
    }


def interrupted(call, at):
    """Runs `call`, with KeyboardInterrupt at the `at`-th line of the package (the next one that a
    signal can be seen at); the lines seen until then."""
    root, seen, due = rgtg_fast.__path__[0], 0, False

    def trace(frame, event, arg):
        nonlocal seen, due
        if not frame.f_code.co_filename.startswith(root):
            return None
        if event == "line":
            seen += 1
            due = due or seen == at
            if due and frame.f_lasti not in _leaving(frame.f_code):
                due = False
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return seen


def state(model):
    """What of a model a call might leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return [
        (sorted(vars(m)), m.training, [len(getattr(m, h)) for h in hooks]) for m in model.modules()
    ] + [sorted(vars(model.config).items(), key=str), vars(model.config).keys()]


def leave_nothing(call, models, scorer, positions):
    """Interrupts `call` at about so many of its lines: each time the models are as they were, and
    the scorer is free."""
    before = [str(state(model)) for model in models]
    lines = interrupted(call, 0)
    for at in range(1, lines + 1, max(1, lines // positions)):
        interrupted(call, at)
        assert [str(state(model)) for model in models] == before, at
        use = turns._in_use.get(id(scorer))  # a traceback may hold it, until it is collected
        assert use is None or not use.lock.locked(), at
        del use
