"""Errors of the library in the words of the command line."""

import re

# Arguments, as error messages name them, and the options of the commands.
_OPTIONS = (
    (r"label_mapping=\{your id: generator id\}, for example \{(\d+): (\d+)\}", r"--label-mapping \1=\2"),
    (r"\blabel_mapping\b", "--label-mapping"),
    (r"\bbox=(\(\(i0.*?k1\)\)|\.\.\.)", "--box I0:I1,J0:J1,K0:K1"),
    (r"\bpass the label map, or allow_label_drift=True", "add --label, or --allow-label-drift"),
    (r"\ballow_label_drift(=True)?\b", "--allow-label-drift"),
    (r"\bresidual=False", "--plain"),
    (r"\bleave guidance=\S+ out", "leave --guidance out"),
    (r"\b(leave out|give it as) source\b", r"\1 --source"),
)


def with_options(message: str) -> str:
    """The message with options instead of arguments."""
    for argument, option in _OPTIONS:
        message = re.sub(argument, option, message)
    return message
