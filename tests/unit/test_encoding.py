"""Encoding and decoding of results, documents and request bodies."""

from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
import tempfile
import time as clock
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID
from xml.etree import ElementTree

import flask
import msgspec
import pytest
import yaml
from flask.json.provider import DefaultJSONProvider
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import NotFound
from werkzeug.local import LocalProxy

from flask_asyncroute.encoding import (
    clean_text,
    decode_json,
    encode_json,
    encode_result,
    encode_xml,
    encode_yaml,
    xml,
)
from flask_asyncroute.encoding import yaml as our_yaml
from flask_asyncroute.errors import InvalidQuery, ResultError

MIB = 2**20


def encoded(value, max_bytes=MIB, default=DefaultJSONProvider.default):
    return encode_result(value, default, max_bytes)


def back(value):
    return json.loads(encoded(value))


def refusal(value, max_bytes=MIB, default=DefaultJSONProvider.default):
    with pytest.raises(ResultError) as caught:
        encoded(value, max_bytes, default)
    return str(caught.value)


class Colour(Enum):
    RED = "red"
    BOTH = ["red", "blue"]


class Level(IntEnum):
    LOW = 1


@dataclass
class Row:
    total: object
    when: object = None


class Box(msgspec.Struct, rename="camel", tag="box"):
    how_many: object
    left_out: object = msgspec.UNSET


class Text(str):
    def __str__(self):
        return "not this"


class Number(int):
    pass


class Real(float):
    pass


class Items(list):
    pass


Point = namedtuple("Point", "x y")

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


class TestResults:
    @given(PLAIN)
    def test_plain_json_round_trips(self, value):
        assert json.loads(encode_result(value, DefaultJSONProvider.default, MIB)) == value

    @given(
        st.recursive(
            st.text(st.characters(), max_size=5)
            | st.floats()
            | st.integers(-(10**30), 10**30)
            | st.none(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.tuples(inner)
                | st.dictionaries(
                    st.text(st.characters(), max_size=4) | st.integers() | st.floats() | st.none(),
                    inner,
                )
            ),
            max_leaves=8,
        ).filter(lambda value: not isinstance(value, tuple))
    )
    def test_unusual_python_data_is_strict_json_or_refused(self, value):
        try:
            body = encode_result(value, DefaultJSONProvider.default, MIB)
        except ResultError as error:
            assert "two keys" in str(error)
        else:
            json.loads(body.decode(), parse_constant=pytest.fail)
            msgspec.json.decode(body)

    def test_encoding_does_not_change_the_value(self):
        value: dict = {"a": [1, (2,), "\ud800"], 1: float("nan"), "b": {"c": Decimal("1.50")}}
        encoded(value)
        assert value["a"][1] == (2,)
        assert value["a"][2] == "\ud800"
        assert 1 in value

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, None),
            ("text", "text"),
            (Markup("<b>"), "<b>"),
            (Text("kept"), "kept"),
            (Number(7), 7),
            (Real(1.5), 1.5),
            (Level.LOW, 1),
            (Colour.RED, "red"),
            (Colour.BOTH, ["red", "blue"]),
            (OrderedDict(a=1), {"a": 1}),
            (Items([1, Items()]), [1, []]),
            ([Point(1, 2)], [[1, 2]]),
            (MultiDict([("a", "1"), ("a", "2")]), {"a": "1"}),
            (MappingProxyType({"a": Number(1)}), {"a": 1}),
            (UserDict(a={"b": 1}), {"a": {"b": 1}}),
            (datetime(2024, 5, 1, 12, 30), "2024-05-01T12:30:00Z"),
            (datetime(2024, 5, 1, 12, 30, 0, 5, tzinfo=UTC), "2024-05-01T12:30:00.000005Z"),
            (
                datetime(2024, 5, 1, tzinfo=timezone(timedelta(hours=2))),
                "2024-05-01T00:00:00+02:00",
            ),
            (
                datetime(1900, 1, 1, tzinfo=timezone(timedelta(minutes=53, seconds=28))),
                "1899-12-31T23:06:32Z",
            ),
            (date(2024, 5, 1), "2024-05-01"),
            (time(9, 5), "09:05:00"),
            (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
            (Decimal("1.10"), "1.10"),
            (Decimal("NaN"), None),
            (Decimal("-Infinity"), None),
            (
                Row(Row(1), date(2024, 1, 2)),
                {"total": {"total": 1, "when": None}, "when": "2024-01-02"},
            ),
            (Box([Decimal(2)]), {"type": "box", "howMany": ["2"]}),
            ({1: "a", 1.5: "b"}, {"1": "a", "1.5": "b"}),
            ({True: "c"}, {"true": "c"}),
            (
                {None: 1, False: 2, Level.LOW: 3, Colour.RED: 4},
                {"null": 1, "false": 2, "1": 3, "red": 4},
            ),
            ({Text("k"): 1}, {"k": 1}),
            (2**64, 2**64),
            (-(2**80), -(2**80)),
        ],
    )
    def test_common_python_types_are_encoded(self, value, expected):
        assert back(value) == expected

    def test_the_json_provider_of_the_app_encodes_other_types(self):
        class Provider(DefaultJSONProvider):
            @staticmethod
            def default(value):
                return {"seconds": value.total_seconds(), "parts": (1, None)}

        default = Provider(flask.Flask("provider")).default
        assert json.loads(encoded([timedelta(minutes=1)], default=default)) == [
            {"seconds": 60.0, "parts": [1, None]}
        ]

    def test_html_objects_are_encoded_by_the_provider(self):
        class Html:
            def __html__(self):
                return "<p>"

        assert back({"a": Html()}) == {"a": "<p>"}

    @pytest.mark.covers("A46")
    def test_nan_and_infinity_become_null(self):
        nan, infinite = float("nan"), float("inf")
        assert back({"a": [nan, infinite, -infinite, Real(nan)], "b": nan}) == {
            "a": [None] * 4,
            "b": None,
        }
        assert encoded(infinite) == b"null"

    def test_lone_surrogates_become_the_replacement_character(self):
        assert back({"\ud800": ["a\udfffb", Text("\udc00")]}) == {"\ufffd": ["a\ufffdb", "\ufffd"]}
        assert back("\ud83d\ude00") == "\U0001f600"

    @pytest.mark.covers("F12")
    def test_a_tuple_is_refused_with_advice(self):
        message = refusal(({"a": 1}, 201))
        assert "tuple" in message
        assert "return only the data" in message
        assert "tuple" in refusal(Point(1, 2))

    @pytest.mark.covers("A68", "F11")
    @pytest.mark.parametrize(
        ("value", "found", "advice"),
        [
            ({1, 2}, "a set", "return a list"),
            (frozenset(), "a frozenset", "return a list"),
            (b"secret", "a bytes", "base64"),
            (bytearray(b"secret"), "a bytearray", "base64"),
            (memoryview(b"secret"), "a memoryview", "base64"),
            (iter([1]), "a list_iterator", "return list(…)"),
            (map(str, ["secret"]), "a map", "return list(…)"),
            (
                flask.Response("secret"),
                "a response (flask.wrappers.Response)",
                "return only the data",
            ),
            (NotFound("secret"), "a response (werkzeug.exceptions.NotFound)", "abort"),
            (object(), "an object", "return data"),
            (LocalProxy(object), "a werkzeug.local.LocalProxy", "that you need"),
            (timedelta(1), "a datetime.timedelta", "return data"),
            (range(3), "a range", "return data"),
            (int, "a type", "return data"),
            (Row, "a type", "return data"),
            (msgspec.Raw(b"not json"), "a msgspec.Raw", "return data"),
            (1j, "a complex", "return data"),
            (10**4300, "more than 4300 digits", "return a float or a str"),
            (-(10**5000), "more than 4300 digits", "return a float or a str"),
            (Number(10**5000), "more than 4300 digits", "return a float or a str"),
            ({b"secret": 1}, "an object with a key of type bytes", "use strings as keys"),
            ({(1, 2): 1}, "an object with a key of type tuple", "use strings as keys"),
            (
                {date(2024, 1, 1): 1},
                "an object with a key of type datetime.date",
                "use strings as keys",
            ),
            ({10**5000: 1}, "more than 4300 digits", ""),
            ({1: "a", "1": "b"}, "two keys that are the same in JSON", "use strings as keys"),
            (
                dict.fromkeys(["a", "\ud800", "\udc00"]),
                "two keys that are the same in JSON",
                "use strings as keys",
            ),
        ],
        ids=lambda part: part if isinstance(part, str) else type(part).__name__,
    )
    def test_unsupported_types_are_refused_with_their_json_path(self, value, found, advice):
        for holder, where in (
            (value, "$:"),
            ({"rows": [0, {"total": value}]}, "$.rows[1].total:"),
            ({"odd key": ({2: value},)}, "$['odd key'][0]['2']:"),
            (Row({"a": Box(value)}), "$.total.a.howMany:"),
            (MappingProxyType({"m": Items([value])}), "$.m[0]:"),
        ):
            message = refusal(holder)
            assert message.startswith("The view returned ")
            assert f"{found} at {where}" in message
            assert advice in message
            assert "secret" not in message

    @pytest.mark.covers("A68")
    def test_open_files_are_refused(self, tmp_path: Path):
        (tmp_path / "a").write_text("secret")
        with (tmp_path / "a").open() as file, tempfile.NamedTemporaryFile() as other:
            assert "an open file (_io.TextIOWrapper) at $.x:" in refusal({"x": file})
            assert "an open file (tempfile._TemporaryFileWrapper) at $:" in refusal(other)

    @pytest.mark.covers("F12")
    def test_generators_and_coroutines_are_refused_without_being_run(self):
        ran = []

        def generator():
            ran.append(1)
            yield 1

        async def coroutine():
            ran.append(1)

        async def stream():
            ran.append(1)
            yield 1

        assert "a generator at $: return list(…)" in refusal(generator())
        assert "a coroutine at $.a: await it" in refusal({"a": coroutine()})
        assert "an async_generator at $: await it" in refusal(stream())
        assert not ran

    @pytest.mark.covers("A68")
    def test_cycles_are_refused_with_their_json_path(self):
        loop: dict = {"a": {"b": []}}
        loop["a"]["b"].append(loop)
        assert "an object that contains itself at $.a.b[0]: return data without cycles" in refusal(
            loop
        )
        row = Row(None)
        row.total = [row]
        assert "contains itself at $.total[0]" in refusal(row)
        items = Items()
        items.append(items)
        assert "contains itself at $[0]" in refusal(items)

    @pytest.mark.covers("A68")
    @pytest.mark.parametrize("kind", ["list", "dict", "dataclass", "provider"])
    def test_more_than_200_levels_are_refused(self, kind):
        def nested(levels):
            value: object = 1
            for _ in range(levels):
                value = {"list": [value], "dict": {"k": value}, "dataclass": Row(value)}.get(
                    kind, UserDict(k=value)
                )
            return value

        encoded(nested(200))
        for levels in (201, 5000):
            message = refusal(nested(levels))
            assert "nested more than 200 levels deep" in message
            assert len(message) < 400

    def test_a_provider_with_endless_output_is_refused(self):
        assert "contains itself" in refusal([object()], default=lambda value: value)
        assert "nested more than 200" in refusal([object()], default=lambda value: [object()])

    def test_an_error_of_the_provider_is_refused_without_its_message(self):
        def default(value):
            raise ValueError("secret")

        message = refusal({"a": object()}, default=default)
        assert (
            message
            == "The view returned an object at $.a: the app's JSON provider raised ValueError for "
            "it."
        )

    def test_an_error_of_a_mapping_is_refused_without_its_message(self):
        class Broken(UserDict):
            def __len__(self):
                raise OSError("secret")

            def items(self):
                raise OSError("secret")

        assert refusal(Broken()) == "Reading the return value of the view raised OSError."

    def test_encoding_near_the_recursion_limit_is_refused(self):
        value: object = 1
        for _ in range(199):
            value = [value]

        def deeper(levels):
            return deeper(levels - 1) if levels else encoded(value)

        with pytest.raises(ResultError, match="nested too deep"):
            deeper(sys.getrecursionlimit() - 250)

    def test_max_result_is_an_exact_limit_in_bytes(self):
        assert len(encoded("x" * 98, 100)) == 100
        assert len(encoded(["é" * 48], 100)) == 100
        for value in ("x" * 99, ["é" * 49], "\n" * 50, [0] * 50, {"k": "x" * 95}):
            message = refusal(value, 100)
            assert "more than ASYNCROUTE_MAX_RESULT (100 bytes)" in message

    @given(PLAIN)
    def test_a_result_of_exactly_max_result_bytes_is_accepted(self, value):
        size = len(encode_json(value))
        assert encode_result(value, DefaultJSONProvider.default, size) == encode_json(value)

    @pytest.mark.covers("A68")
    def test_encoding_stops_once_the_result_is_too_large(self):
        encoded_values = []

        def default(value):
            encoded_values.append(value)
            return "x" * 1000

        refusal([object() for _ in range(100_000)], 150_000, default)
        assert not encoded_values  # 100,000 items cannot fit, whatever their size
        refusal([object() for _ in range(50_000)], 150_000, default)
        assert len(encoded_values) < 100

        shared: list = [0] * 10
        for _ in range(50):
            shared = [shared] * 10
        begun = clock.monotonic()
        assert "MAX_RESULT" in refusal(shared)
        assert clock.monotonic() - begun < 5

    def test_long_keys_and_paths_are_cut(self):
        assert len(refusal({"k" * 5000: set()})) < 200
        value: object = set()
        for index in range(150):
            value = {f"step{index}": value}
        message = refusal(value)
        assert len(message) < 400
        assert "…" in message


def read_xml(body: bytes):
    """Decode the output of ``encode_xml`` as its docstring specifies."""

    def text_of(element):
        text = element.text or ""
        return base64.b64decode(text).decode() if element.get("encoding") == "base64" else text

    def name_of(element):
        name = element.get("name", element.tag)
        return base64.b64decode(name).decode() if element.get("name-encoding") == "base64" else name

    def value_of(element):
        if element.get("nil") == "true":
            return None
        kind = element.get("type", "string")
        if kind == "object":
            return {name_of(child): value_of(child) for child in element}
        if kind == "array":
            assert all(child.tag == "item" and "name" not in child.attrib for child in element)
            return [value_of(child) for child in element]
        if kind in ("number", "boolean"):
            return json.loads(text_of(element))
        return text_of(element)

    return value_of(ElementTree.fromstring(body))


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = ANY_TEXT | st.sampled_from(
    ["item", "Result", "a b", "xmlns", "a:b", "", "1", "größe", "\u0220", "日本", "-a"]
)
DOCUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def same(first, second):
    """Return whether two values and their types are equal: ``1``, ``1.0`` and ``True`` differ."""
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and list(first) == list(second)
            and all(same(first[key], second[key]) for key in first)
        )
    if isinstance(first, list):
        return (
            isinstance(second, list) and len(first) == len(second) and all(map(same, first, second))
        )
    if isinstance(first, float) and first == 0:
        return isinstance(second, float) and math.copysign(1, first) == math.copysign(1, second)
    return type(first) is type(second) and first == second


class TestXml:
    @settings(max_examples=400)
    @given(DOCUMENTS)
    def test_any_result_round_trips(self, value):
        assert same(read_xml(encode_xml(value, "Result")), value)

    def test_xml_of_a_task(self):
        document = {
            "Id": "x1",
            "Cancellable": True,
            "Progress": 12.5,
            "Result": {
                "InnerValue": "Hi",
                "n": 1,
                "f": 1.0,
                "t": False,
                "none": None,
                "list": [1, "1"],
                "a b": {},
            },
            "Permission": {"Read": {"Users": ["ada", "b"]}},
        }
        assert encode_xml(document, "AsyncRouteTask").decode() == (
            "<?xml version='1.0' encoding='utf-8'?>\n"
            "<AsyncRouteTask><Id>x1</Id><Cancellable>true</Cancellable><Progress>12.5</Progress>"
            '<Result type="object"><InnerValue>Hi</InnerValue><n type="number">1</n><f '
            'type="number">1.0</f>'
            '<t type="boolean">false</t><none nil="true" /><list type="array"><item '
            'type="number">1</item>'
            '<item>1</item></list><item name="a b" type="object" /></Result>'
            "<Permission><Read><Users><item>ada</item><item>b</item></Users></Read></Permission></AsyncRouteTask>"
        )

    def test_xml_of_a_task_list(self):
        body = encode_xml([{"Id": "a"}, {"Result": 1}], "AsyncRouteTasks")
        assert body.endswith(
            b'<AsyncRouteTasks><item><Id>a</Id></item><item><Result type="number">1</Result></item></AsyncRouteTasks>'
        )

    def test_names_that_are_not_valid_xml_are_attributes(self):
        value = {
            "größe": 1,
            "item": 2,
            "a:b": 3,
            "XmlThing": 4,
            "": 5,
            "\u0220": 6,
            "\x01": 7,
            "a\nb\r": 8,
            "{u}n": 9,
        }
        body = encode_xml(value, "Result").decode()
        assert '<größe type="number">1</größe>' in body
        for key in ("item", "a:b", "XmlThing", "", "\u0220", "{u}n"):
            assert f'<item name="{key}" type="number">' in body
        assert '<item name="AQ==" name-encoding="base64" type="number">7</item>' in body
        assert '<item name="a&#10;b&#13;" type="number">8</item>' in body

    def test_text_invalid_in_xml_is_base64_outside_results(self):
        assert b'<Error encoding="base64">YQBi</Error>' in encode_xml(
            {"Error": "a\0b"}, "AsyncRouteTask"
        )

    def test_markup_is_escaped(self):
        body = encode_xml({"a": "]]><script>&amp;\"'", "b\"<>'&": 1}, "Result")
        assert b"<script>" not in body
        assert read_xml(body) == {"a": "]]><script>&amp;\"'", "b\"<>'&": 1}

    def test_deep_documents_are_encoded(self):
        value: object = 1
        for _ in range(205):
            value = [value]
        assert read_xml(encode_xml(value, "Result")) == value

    def test_values_other_than_plain_json_are_refused(self):
        for value in (msgspec.Raw(b"1"), object(), b"1", (1,)):
            with pytest.raises(TypeError, match="plain JSON"):
                encode_xml({"Result": value}, "AsyncRouteTask")


TRICKY = [
    *(
        "no",
        "No",
        "NO",
        "yes",
        "on",
        "off",
        "y",
        "N",
        "true",
        "~",
        "null",
        "Null",
        "",
        " ",
        "=",
        "<<",
        "1e3",
        "1E3",
    ),
    *(
        "1_000",
        "0o17",
        "017",
        "0x1F",
        "0b1",
        "+1",
        ".5",
        "1.",
        "1e+300",
        ".inf",
        "-.INF",
        ".nan",
        "12:30:45",
        "190:20",
    ),
    *(
        "2024-01-01",
        "2024-01-01T00:00:00Z",
        "2024-1-1 1:2:3",
        "!!python/x",
        "!t",
        "&a",
        "*a",
        "- a",
        "? a",
        "a: b",
        "a:",
    ),
    *(
        "a #b",
        "#",
        "%TAG",
        "@",
        "`",
        "---",
        "...",
        "--- a",
        "'",
        '"',
        "\\",
        "{",
        "[a",
        "a, b",
        "|",
        ">",
        "\n",
        "a\n",
        "\na",
    ),
    *(
        "a\n\nb",
        "\r",
        "\r\n",
        "\t",
        "\ta",
        "a\t",
        " a",
        "a ",
        "\x85",
        "a\x85b",
        "\u2028",
        "\u2029",
        "\ufeff",
        "\ufeffa",
    ),
    *(
        "\U0001f600",
        "\0",
        "\x1b[31m",
        "\x7f",
        "\x9f",
        "\ud7ff",
        "\ue000",
        "\ufffd",
        "\ufffe",
        "\uffff",
        "\U0010ffff",
    ),
    *("\u202e", "\u200b", "\u00a0", "é" * 300, "word " * 60, "k" * 3000),
]


class TestYaml:
    @settings(max_examples=400)
    @given(DOCUMENTS)
    def test_any_document_round_trips(self, value):
        assert same(yaml.safe_load(encode_yaml(value)), value)

    @pytest.mark.covers("A55")
    @pytest.mark.parametrize("text", TRICKY, ids=lambda text: ascii(text)[:20])
    def test_strings_stay_strings(self, text):
        document = {"value": text, text: [text], "list": [text, {text: text}]}
        body = encode_yaml(document)
        for loader in (yaml.SafeLoader, yaml.CSafeLoader):
            assert yaml.load(body, loader) == document

    @pytest.mark.covers("A55")
    @pytest.mark.parametrize("text", TRICKY, ids=lambda text: ascii(text)[:20])
    def test_strings_round_trip_without_libyaml(self, text, monkeypatch):
        monkeypatch.delattr(yaml, "CSafeDumper")
        our_yaml._dumper.cache_clear()
        try:
            document = {"value": text, text: [text, 1e300, -0.0, 10**30]}
            assert yaml.safe_load(encode_yaml(document)) == document
        finally:
            our_yaml._dumper.cache_clear()

    @pytest.mark.covers("A55")
    @pytest.mark.parametrize("text", ["1e3", "0o17", "y", "N", "1.", "0x1F", "08"])
    def test_strings_that_other_yaml_parsers_misread_are_quoted(self, text):
        assert encode_yaml([text]) == f"- '{text}'\n".encode()

    @pytest.mark.parametrize(
        "number", [1e300, 1e-7, 5e-324, 1e16, -0.0, 1.0, 0.1, 10**30, -(10**30), 0, 7, -7]
    )
    def test_numbers(self, number):
        assert same(yaml.safe_load(encode_yaml({"n": number})), {"n": number})

    def test_yaml_of_a_task_is_readable(self):
        shared = ["a"]
        document = {
            "State": "Completed",
            "Name": "Größe \U0001f600",
            "One": shared,
            "Two": shared,
            "IsCompleted": True,
        }
        assert encode_yaml(document).decode() == (
            'State: Completed\nName: "Größe \\U0001F600"\nOne:\n- a\nTwo:\n- a\nIsCompleted: true\n'
        )

    def test_deep_documents_are_encoded(self):
        value: object = 1
        for _ in range(205):
            value = [value]
        assert encode_yaml(value).endswith(b"- 1\n")

    def test_raw_json_is_refused(self):
        with pytest.raises(yaml.representer.RepresenterError):
            encode_yaml({"Result": msgspec.Raw(b"1")})


class TestDocuments:
    def test_raw_json_is_inserted_unchanged(self):
        assert (
            encode_json({"Id": "é", "Result": msgspec.Raw(b'{"a":1}')})
            == '{"Id":"é","Result":{"a":1}}'.encode()
        )

    def test_clean_text_replaces_invalid_characters_and_cuts(self):
        assert clean_text("a\0b\ud800c", 100) == "a\ufffdb\ufffdc"
        assert clean_text("\ud83d\ude00", 10) == "\U0001f600"
        assert clean_text("é" * 10, 3) == "ééé"
        assert clean_text("", 3) == ""

    @given(st.text(st.characters()), st.integers(0, 20))
    def test_clean_text_can_be_stored(self, text, limit):
        cleaned = clean_text(text, limit)
        cleaned.encode()
        assert "\0" not in cleaned
        assert len(cleaned) <= limit


def detail(data: bytes) -> str:
    with pytest.raises(InvalidQuery) as caught:
        decode_json(data, "The query")
    assert caught.value.detail.startswith("The query ")
    return caught.value.detail


class TestBodies:
    @given(DOCUMENTS)
    def test_decode_json_round_trips(self, value):
        assume("\\u0000" not in json.dumps(value))
        assert same(decode_json(json.dumps(value).encode(), "The query"), value)

    def test_whitespace_and_escapes_are_decoded(self):
        assert decode_json(b'\r\n\t {"a": "\\u00e9\\ud83d\\ude00"} ', "The query") == {
            "a": "é\U0001f600"
        }

    @pytest.mark.covers("A48")
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "is empty"),
            (b" \r\n", "is empty"),
            (b'\xef\xbb\xbf{"a":1}', "byte order mark"),
            ('{"a":1}'.encode("utf-16"), "byte order mark"),
            ('{"a":1}'.encode("utf-16-le"), "UTF-16"),
            ('{"a":1}'.encode("utf-32-be"), "UTF-16 or UTF-32"),
            (b'{"a": "\xff"}', "byte 0xff at offset 7"),
            (b'"\xed\xa0\x80"', "not UTF-8"),
            ('{"a": "é"}'.encode("latin-1"), "not UTF-8"),
            (b"<a/>", "is not JSON: Expecting value at line 1, column 1"),
            (b"{'a': 1}", "line 1, column 2"),
            (b'{"a": 1}\n x', "line 2, column 2"),
            (b'{"a": 01}', "is not JSON"),
            (b'"\x01"', "is not JSON"),
            (b'{"a": "\x00"}', "is not JSON"),
        ],
    )
    def test_invalid_json_is_refused_with_the_reason(self, data, message):
        assert message in detail(data)

    @pytest.mark.covers("A46")
    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
    def test_nan_and_infinity_are_refused(self, number):
        assert f"contains {number}, which is not JSON" in detail(b'{"a": [%s]}' % number.encode())

    @pytest.mark.covers("A40")
    def test_numbers_out_of_range_are_refused(self):
        assert "'1e999'" in detail(b"[1e999]")
        assert "'-1e999'" in detail(b"[-1e999]")
        assert "5000 digits" in detail(b"[" + b"1" * 5000 + b"]")
        assert decode_json(b"1" * 300, "The query") == int("1" * 300)

    @pytest.mark.covers("A45")
    @pytest.mark.parametrize(
        "data",
        [
            b"[" * 100_000,
            b"[" * 100_000 + b"]" * 100_000,
            b'{"a":' * 100_000,
            b'[{"]":"\\"}","a":' * 65 + b"1" + b"}]" * 65,
        ],
    )
    def test_more_than_64_levels_are_refused(self, data):
        assert "more than 64 levels deep" in detail(data)

    def test_brackets_in_strings_and_wide_data_do_not_count_as_levels(self):
        assert decode_json(b'["' + b"[{" * 500 + b'\\"["]', "The query")
        assert len(decode_json(b"[" + b",".join([b"[{}]"] * 500) + b"]", "The query")) == 500
        assert decode_json(b"[" * 64 + b"]" * 64, "The query")

    @pytest.mark.parametrize(
        "data", [b'["' + b'\\"' * 500_000, b'"[' * 500_000, b'["\\' * 300_000, b"[" + b'"' * 10**6]
    )
    def test_hostile_input_is_refused_quickly(self, data):
        begun = clock.monotonic()
        detail(data)
        assert clock.monotonic() - begun < 2

    @pytest.mark.covers("A37")
    def test_duplicate_names_are_refused(self):
        assert "the name 'State' twice" in detail(b'{"State": 1, "b": {}, "State": 1}')
        assert "the name 'op' twice" in detail(b'{"State": [{"op": 1, "\\u006fp": 2}]}')
        assert decode_json(b'[{"a": 1}, {"a": {"a": 2}}]', "The query") == [
            {"a": 1},
            {"a": {"a": 2}},
        ]

    @pytest.mark.covers("A44")
    @pytest.mark.parametrize(
        ("data", "where"),
        [
            (b'"\\u0000"', "in the string at $"),
            (b'{"a": [1, "x\\ud800"]}', "in the string at $.a[1]"),
            (b'{"a": {"\\udfff": 1}}', "in the name '\ufffd' at $.a"),
            (b'{"a\\u0000": 1}', "in the name 'a\ufffd' at $"),
        ],
    )
    def test_nul_and_lone_surrogates_are_refused(self, data, where):
        assert detail(data).endswith(f"{where}.")

    @given(st.binary(max_size=40) | st.text('{}[]",:\\u0123dNaIe-.', max_size=40).map(str.encode))
    def test_any_bytes_are_decoded_or_refused(self, data):
        try:
            value = decode_json(data, "The query")
        except InvalidQuery:
            return
        assert encode_json(value)


SMALL_STACK = """
import sys, threading
from flask_asyncroute.encoding import decode_json
from flask_asyncroute.errors import InvalidQuery

sys.setrecursionlimit(1_000_000)
threading.stack_size(128 * 1024)
found = []

def run():
    try:
        decode_json(b"[" * 1_000_000, "The query")
    except InvalidQuery as error:
        found.append(str(error))

thread = threading.Thread(target=run)
thread.start()
thread.join()
print(found)
"""


@pytest.mark.covers("A45")
def test_deep_json_does_not_crash_threads_with_small_stacks() -> None:
    command = [sys.executable, "-c", SMALL_STACK]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "nested more than 64 levels deep" in ended.stdout


def test_a_key_with_markup_never_reaches_the_xml_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("a key was parsed")

    monkeypatch.setattr(xml.expat, "ParserCreate", fail)
    for key in ('!DOCTYPE \xe9[<!ENTITY a "x">]><\xe9>&a;</\xe9><z', "\xe9 b", "\xe9&a;", "a/\xe9"):
        assert b"<item name=" in encode_xml({key: 1}, "Result")
