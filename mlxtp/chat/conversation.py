"""What was said so far, and its file."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from mlxtp.chat.client import Delta
from mlxtp.comm.errors import UsageError


@dataclass
class Turn:
    """What a person said, and the answer as far as it came."""

    question: str
    answer: str = ""
    reasoning: str = ""

    def add(self, delta: Delta) -> None:
        """Add a piece of the answer."""
        if delta.kind == "text":
            self.answer += delta.text
        else:
            self.reasoning += delta.text


@dataclass
class Conversation:
    """The turns so far, with what the system message says before them."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """List the messages in OpenAI's form, the reasoning of answers among them."""
        messages = [] if self.system is None else [_message("system", self.system)]
        for turn in self.turns:
            messages.append(_message("user", turn.question))
            if turn.answer:
                messages.append(_message("assistant", turn.answer))
            if turn.answer and turn.reasoning:
                messages[-1]["reasoning_content"] = turn.reasoning
        return messages

    def ask(self, question: str) -> Turn:
        """Begin a turn; one that got no answer is forgotten."""
        if self.turns and not self.turns[-1].answer:
            del self.turns[-1]
        self.turns.append(Turn(question))
        return self.turns[-1]

    def retry(self) -> Turn:
        """Begin the last turn again.

        Raises: UsageError if there is none.
        """
        if not self.turns:
            raise UsageError("there is nothing to ask again")
        self.turns[-1] = Turn(self.turns[-1].question)
        return self.turns[-1]

    def save(self, path: Path, model: str) -> None:
        """Write a file: JSON or Markdown, by the ending of its name.

        Raises: UsageError for another ending, and if it cannot be written.
        """
        writers = {".json": self._json, ".md": self._markdown}
        if path.suffix not in writers:
            raise UsageError(f"{path}: wanted a name that ends in .json or .md")
        try:
            path.write_text(writers[path.suffix](model), "utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read a file of JSON that `save` wrote.

        Raises: UsageError if it is none.
        """
        conversation = cls()
        try:
            for message in json.loads(path.read_text("utf-8"))["messages"]:
                conversation._take(**message)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, IndexError):
            raise UsageError(f"{path} is no JSON file of a conversation") from None
        return conversation

    def _take(self, role: str, content: str, reasoning_content: str = "") -> None:
        match role:
            case "system":
                self.system = content
            case "user":
                self.turns.append(Turn(content))
            case "assistant":
                self.turns[-1].answer = content
                self.turns[-1].reasoning = reasoning_content
            case _:
                raise ValueError(role)

    def _json(self, model: str) -> str:
        content = {"model": model, "messages": self.messages()}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def _markdown(self, model: str) -> str:
        parts = [f"# {model}"]
        parts += [] if self.system is None else ["## System", self.system]
        for turn in self.turns:
            parts += ["## User", turn.question, "## Assistant", turn.answer]
        return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
