"""Reads the page of ``tokprune verify --html``, and sees to it that its tags fit one another."""

from html.parser import HTMLParser

VOID = {"meta", "img", "wbr", "link"}


class Page(HTMLParser):
    """Holds tags against one another while it reads; ``tags`` are (name, attributes, the text within)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict, list[str]]] = []
        self._open: list[tuple[str, dict, list[str]]] = []
        assert text.startswith("<!DOCTYPE html>")
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(self.tags[-1])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self._open:
            texts.append(data)

    def all(self, *names: str) -> list[tuple[dict, str]]:
        return [(attrs, " ".join("".join(texts).split())) for tag, attrs, texts in self.tags if tag in names]

    def texts(self, *names: str) -> list[str]:
        return [text for _, text in self.all(*names)]
