"""Runtime expressions: parsing, errors with their position, and resolution of templates."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_asyncroute.callbacks.expressions import (
    BadExpression,
    Expression,
    NotText,
    Source,
    Template,
    parse,
)

URL = "http://localhost/x?y=1"


def request(**values: Any) -> Source:
    """Return a source of values for templates."""
    found = {"url ": URL, "method ": "PUT"} | values
    return lambda kind, name: found.get(f"{kind} {name}")


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("$url", "url", ""), ("$method", "method", ""), ("$request.query.x", "query", "x"), ("$request.query.a.b c", "query", "a.b c"),
        ("$request.header.X-Hook", "header", "X-Hook"), ("$request.path.id", "path", "id"), ("$request.body", "body", ""),
        ("$request.body#", "body", ""), ("$request.body#/callbackUrl", "body", "/callbackUrl"), ("$request.body#/a~1b/~0/0", "body", "/a~1b/~0/0"),
        ("$request.body#/", "body", "/"), ("$request.query.é", "query", "é"),
    ],
)  # fmt: skip
def test_a_single_expression_is_parsed(text: str, kind: str, name: str) -> None:
    assert parse(text).parts == (Expression(text, kind, name),)
    assert parse(text).is_alone and not parse(text).is_literal
    if "}" not in text:
        assert parse(f"a{{{text}}}b").parts == ("a", Expression(text, kind, name), "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$", "character 1"), ("$x", "'\\$x' at character 1"), ("$urls", "not an expression"), ("$url ", "not an expression"), ("$URL", "not an expression"),
        ("$request", "not an expression"), ("$request.", "character 10"), ("$request.cookie.x", "'cookie' at character 10"), ("$request.query", "'query'"),
        ("$request.query.", "a name is missing at character 16"), ("$request.header.a b", "character 17.*header"), ("$request.header.a:", "header"),
        ("$request.query.a\nb", "control character at character 17"), ("$request.query.\ud800", "control character"),
        ("$request.body/x", "JSON pointer"), ("$request.body#x", "JSON pointer"), ("$request.body#/~", "~ at character 16"), ("$request.body#/~2", "~0"),
        ("$response.body#/x", "not known when the task is started"), ("$statusCode", "not known when"), ("$response.header.x", "not known when"),
        ("x{", "{ at character 2 has no }"), ("x}", "} at character 2 has no {"), ("{}", "character 2"), ("{url}", "'url' at character 2"),
        ("a{$url}}", "} at character 8"), ("{{$url}}", "character 2"), ("http://h/$request.query.x", "character 10.*put the expression in"),
        ("Bearer $url", "character 8"), ("a{ $url}", "character 3"), ("{$statusCode}", "character 2"), ("{$url", "no }"),
    ],
)  # fmt: skip
def test_a_syntax_error_names_its_position(text: str, message: str) -> None:
    with pytest.raises(BadExpression, match=message):
        parse(text)


@pytest.mark.parametrize("text", ["", "POST", "http://h/a$b", "5 $", "$ 5"[1:], "a$urls"])
def test_text_without_expressions_is_literal(text: str) -> None:
    assert parse(text).is_literal and not parse(text).is_alone
    assert parse(text).resolve(request()) == text


def test_a_template_is_resolved() -> None:
    template = parse("http://h/{$request.query.x}/{$method}?{$request.body#/y}")
    assert (template.beginning, template.is_alone, template.is_literal) == (
        "http://h/",
        False,
        False,
    )
    source = request(**{"query x": "a b", "body /y": "é"})
    assert template.resolve(source) == "http://h/a b/PUT?é"
    assert template.resolve(source, lambda value: f"<{value}>") == "http://h/<a b>/<PUT>?<é>"


def test_the_value_of_a_lone_expression_is_not_escaped() -> None:
    assert parse("$url").resolve(request(), lambda value: "never") == URL
    assert parse("{$url}").resolve(request(), lambda value: "never") == URL


@pytest.mark.parametrize(
    "text", ["$request.query.x", "a{$request.query.x}b{$method}", "{$request.body#/x}"]
)
def test_a_missing_value_makes_the_result_none(text: str) -> None:
    assert parse(text).resolve(request()) is None
    assert Template(()).resolve(request()) == ""


@pytest.mark.parametrize("value", [5, 1.5, True, False, [], {}, ["x"], {"a": "b"}])
@pytest.mark.parametrize("text", ["$request.body#/x", "a{$request.body#/x}"])
def test_a_value_that_is_not_a_string_is_refused(text: str, value: Any) -> None:
    with pytest.raises(NotText, match=r"\$request.body#/x is "):
        parse(text).resolve(request(**{"body /x": value}))


NAMES = st.text(st.characters(exclude_characters="{}", exclude_categories=["Cc", "Cs"]), min_size=1)
TOKENS = st.text("abcXYZ-_.!#$%&'*+^`|~09", min_size=1)
POINTERS = st.lists(NAMES.map(lambda name: name.replace("~", "~0").replace("/", "~1"))).map(
    lambda parts: "".join(f"/{part}" for part in parts)
)
EXPRESSIONS = st.one_of(
    st.sampled_from([Expression("$url", "url"), Expression("$method", "method")]),
    NAMES.map(lambda name: Expression(f"$request.query.{name}", "query", name)),
    NAMES.map(lambda name: Expression(f"$request.path.{name}", "path", name)),
    TOKENS.map(lambda name: Expression(f"$request.header.{name}", "header", name)),
    POINTERS.map(lambda pointer: Expression(f"$request.body#{pointer}", "body", pointer)),
)  # fmt: skip
LITERALS = st.text(st.characters(exclude_characters="{}$", exclude_categories=["Cs"]), min_size=1)


@given(st.lists(st.tuples(LITERALS, EXPRESSIONS)), LITERALS)
def test_any_template_round_trips(pairs: list[tuple[str, Expression]], last: str) -> None:
    parts = [*(part for pair in pairs for part in pair), last]
    text = "".join(part if isinstance(part, str) else f"{{{part.text}}}" for part in parts)
    assert parse(text).parts == tuple(parts)


@given(EXPRESSIONS)
def test_any_lone_expression_round_trips(expression: Expression) -> None:
    assert parse(expression.text).parts == (expression,)


@given(st.one_of(st.text(), st.text("${}#/~.requstbodyhl x", max_size=40)))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse(text)
    except BadExpression as error:
        assert str(error)
