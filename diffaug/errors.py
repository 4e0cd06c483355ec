"""The errors that diffaug raises on purpose: messages name what was wrong, the value found and what to do."""

from collections.abc import Sequence


class DiffaugError(ValueError):
    """Base of every error that diffaug raises on purpose."""


class LabelError(DiffaugError):
    """Label ids that a generator does not know, or a label map that is missing where one is needed."""


class VerbError(DiffaugError):
    """A verb that the generator does not have, or that it cannot apply to this input."""


class CardError(DiffaugError):
    """A generator's folder, card or weights that cannot be used."""


class UnlikeError(DiffaugError):
    """An image that is unlike what a generator was trained on."""


class LeakError(DiffaugError):
    """Held-out scans that trained a generator, or that something in training was made from."""


class DatasetError(DiffaugError):
    """Everything that is wrong with a dataset, in one message.

    Args:
        problems: one line per problem, each with the file, the value found and what to do. At least one.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        if isinstance(problems, str):
            problems = [problems]
        super().__init__(list(problems))
        self.problems: list[str] = list(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = (f"  - {problem}" for problem in self.problems)
        return "\n".join([f"{len(self.problems)} problems:", *lines])


class ExtraError(DiffaugError, ImportError):
    """An optional package that is not installed.

    Args:
        package: the package that is missing, as users know it ("nnU-Net").
        extra: the extra of diffaug that installs it ("nnunet").
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(package, extra)
        self.package = package
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.package} is not installed; install it with: pip install 'diffaug[{self.extra}]'"
