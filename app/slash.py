"""What the slash commands do."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from leankv_app.allowed import changed, confirmation, listing
from leankv_app.commands import COMMANDS, SLOW
from leankv_app.factory import full_kv
from leankv_app.format import counted, megabytes, sentence
from leankv_app.opening import Openings, OpeningStopped
from leankv_app.sample import QUESTIONS, SAMPLE
from leankv_app.store import StoreError, export
from leankv_app.texts import saving
from leankv_app.typed import path_of, source_of
from leankv_mlx.documents.readers import STDIN
from leankv_mlx.errors import ConfigError
from leankv_mlx.faults import described
from leankv_mlx.folders import expanded

if TYPE_CHECKING:
    from leankv_app.screens.chat import ChatScreen

SUMMARIZE = "Summarize the document."


class Slash:
    """One method per command; each gets what follows the command's name."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen
        self.openings = Openings()

    async def run(self, name: str, rest: str) -> None:
        """Carry out a command; what it says comes at the end of the conversation."""
        self._screen.conversation.latest()
        if name not in COMMANDS:
            await self._screen.note(f"There is no command {name}; /help lists them.", error=True)
            return
        done = getattr(self, name[1:])(rest)
        if name in SLOW:
            self._screen.run_worker(done)
        elif inspect.isawaitable(done):
            await done

    def help(self, rest: str) -> None:
        """Keys and commands."""
        from leankv_app.screens.help import HelpScreen

        self._screen.app.push_screen(HelpScreen(COMMANDS))

    def model(self, rest: str) -> None:
        """The picker, or a model by name."""
        if rest:
            self._screen.load(path_of(rest))
        else:
            self._screen.open_models()

    async def system(self, rest: str) -> None:
        """Set or show the system prompt."""
        chat = self._screen.chat
        if rest:
            chat.set_system(rest)
            await self._screen.note("The system prompt is set; it holds from the next message.")
        else:
            await self._screen.note(f"System prompt: {chat.system or '(none)'}")

    async def set(self, rest: str) -> None:
        """Change one setting, or say what there is."""
        name, _, value = rest.partition(" ")
        screen, app = self._screen, self._screen.chat_app
        try:
            if not value:
                await screen.note(listing(app.settings, name))
                return
            settings = changed(app.settings, name, value.strip())
        except ValueError as error:
            await screen.note(f"{sentence(str(error))}.", error=True)
            return
        app.change_settings(settings)
        if name == "panel":  # keys may have changed what is shown
            screen.show_panel(settings.panel)
        await screen.note(confirmation(settings, name))

    async def file(self, rest: str) -> bool:
        """Put a document in context; True if it could be read."""
        if not rest or rest == STDIN:
            await self._screen.note("Name a file or an address: /file PATH", error=True)
            return False
        asked_in = self._screen.chat.messages
        try:
            document = await self.openings.document(source_of(rest), self._screen.progress)
        except OpeningStopped:
            await self._screen.note("Stopped; the document is not in context.")
            return False
        except Exception as error:  # whatever it is, it must not end the chat
            await self._screen.note(sentence(described(error)), error=True)
            return False
        if self._screen.chat.messages is not asked_in:
            return False  # another chat has begun meanwhile
        for line in document.notes:
            await self._screen.note(line)
        await self._screen.read(document)
        return True

    async def summarize(self, rest: str) -> None:
        """Summarize a document."""
        chat = self._screen.chat
        if rest and not await self.file(rest):
            return
        if not chat.documents and not any(m.shown for m in chat.messages):
            await self._screen.note("There is no document yet: /summarize PATH", error=True)
            return
        await self._screen.ask(SUMMARIZE)

    async def demo(self, rest: str) -> None:
        """A sample document, and what to ask about it."""
        if await self.file(str(SAMPLE)):
            await self._screen.note("\n".join(["Ask for example:", *QUESTIONS, SUMMARIZE]))

    async def kv(self, rest: str) -> None:
        """Show or change the compression."""
        screen = self._screen
        if not rest:
            await screen.note(f"Compression: {screen.chat.kv}. Change it with /kv small or k3v2.")
            return
        try:
            screen.chat.recode(full_kv(rest))
        except ConfigError as error:
            await screen.note(str(error), error=True)

    async def stats(self, rest: str) -> None:
        """Numbers of the cache and the last reply."""
        screen = self._screen
        lines = []
        if (loaded := screen.loaded) is not None:
            lines.append(
                f"{loaded.name}: {loaded.compressed} of {counted(loaded.layers, 'layer')} "
                f"compressed, "
                f"weights {megabytes(loaded.weights)}, budget {megabytes(loaded.budget)}"
            )
        if (now := screen.snapshot) is not None:
            lines.append(
                f"{counted(now.tokens, 'token')} in {megabytes(now.used)} "
                f"(fp16 {megabytes(now.fp16)}; {saving(now)[0]}), "
                f"allocated {megabytes(now.allocated)}, process peak "
                f"{megabytes(now.process_peak)}, {counted(now.context_left, 'token')} left"
            )
        if (done := screen.done) is not None:
            read = done.prompt_tokens - done.reused
            lines.append(
                f"last reply: {counted(done.tokens, 'token')} in {done.decode_seconds:.1f} s; "
                f"{counted(read, 'prompt token')} read in {done.prefill_seconds:.1f} s, "
                f"{done.reused:,} reused"
            )
        await screen.note("\n".join(lines) or "Nothing has happened yet.")

    async def compact(self, rest: str) -> None:
        """Replace the conversation by its summary."""
        screen = self._screen
        if screen.chat.busy:
            await screen.note("Wait for the reply, or stop it with Esc.", error=True)
        elif (summary := screen.chat.compact()) is None:
            await screen.note("There is nothing to summarize yet.", error=True)
        else:
            await screen.follow(summary, "Summary of the conversation")

    async def clear(self, rest: str) -> None:
        """A new chat."""
        await self._screen.new_chat()

    async def regenerate(self, rest: str) -> None:
        """Ask for the last reply again."""
        await self._screen.regenerate()

    async def copy(self, rest: str) -> None:
        """Copy the n-th last reply."""
        replies = [m for m in self._screen.chat.messages if m.role == "assistant" and m.text]
        try:
            number = int(rest or 1)
        except ValueError:  # not all that isdigit() takes is a number for int()
            number = 0
        if not 1 <= number <= len(replies):
            await self._screen.note("There is no such reply.", error=True)
            return
        self._screen.app.copy_to_clipboard(replies[-number].text)
        self._screen.notify("copied")

    async def export(self, rest: str) -> None:
        """Write the chat to Markdown."""
        screen, chat = self._screen, self._screen.chat
        if not chat.messages:
            await screen.note("There is nothing to export yet.", error=True)
            return
        text = export.markdown(chat.title or "Chat", chat.model, chat.kv, chat.messages)
        default = screen.chat_app.paths.exports / export.file_name(chat.title)
        path = expanded(path_of(rest)) if rest else default
        try:
            await screen.note(f"Written to {export.write(path, text)}")
        except (OSError, ValueError) as error:  # or it is no name of a file at all
            why = getattr(error, "strerror", None) or error
            await screen.note(f"{path} cannot be written: {why}.", error=True)

    async def resume(self, rest: str) -> None:
        """The list of sessions, or one by number."""
        screen = self._screen
        if not rest:
            screen.open_sessions()
            return
        try:
            found = screen.chat.store.find(rest)
        except StoreError as error:
            screen.say_error("Chats", str(error))
            return
        if found is None:
            await screen.note(f"There is no session {rest}.", error=True)
        else:
            await screen.resume(found)

    async def rename(self, rest: str) -> None:
        """Another title."""
        if not rest:
            await self._screen.note("Say the title: /rename TEXT", error=True)
            return
        self._screen.chat.rename(" ".join(rest.split()))
        self._screen.show_title()

    def quit(self, rest: str) -> None:
        """Leave."""
        self._screen.app.exit()
