"""The sample app: its Xcode project, texts and manifests. What it does is tested in Swift; its views need a Mac."""

from __future__ import annotations

import json
import plistlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlx_ttt.export.companions.folder import _FILES

ROOT = Path(__file__).parents[2]
APP = ROOT / "examples" / "Reader"
VIEWS = sorted((APP / "Reader").glob("*.swift"))
MADE_BY_EXPORT = "Model/"  # README.md says with which command


class Plist:
    """An old property list, as Xcode writes its projects: dictionaries, lists and strings."""

    _TOKEN = re.compile(r'\s+|//[^\n]*|/\*.*?\*/|("(?:[^"\\]|\\.)*"|[{}();=,]|[\w./$-]+)', re.DOTALL)

    def __init__(self, text: str):
        self._tokens, at = [], 0
        while at < len(text):
            match = self._TOKEN.match(text, at)
            assert match, f"not a property list at {text[at : at + 40]!r}"
            self._tokens += [match[1]] if match[1] else []
            at = match.end()
        self._tokens.reverse()
        self.content = self._value()
        assert not self._tokens

    def _value(self) -> Any:
        token = self._tokens.pop()
        if token == "{":
            found: dict[str, Any] = {}
            while self._tokens[-1] != "}":
                key = self._value()
                assert self._tokens.pop() == "="
                assert key not in found, f"{key} is there twice"
                found[key] = self._value()
                assert self._tokens.pop() == ";"
            self._tokens.pop()
            return found
        if token == "(":
            items = []
            while self._tokens[-1] != ")":
                items.append(self._value())
                assert self._tokens.pop() == ","
            self._tokens.pop()
            return items
        return token.strip('"')


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return Plist((APP / "Reader.xcodeproj" / "project.pbxproj").read_text()).content


@pytest.fixture(scope="module")
def objects(project) -> dict[str, dict[str, Any]]:
    return project["objects"]


def of_kind(objects, kind: str) -> dict[str, dict[str, Any]]:
    return {id: item for id, item in objects.items() if item["isa"] == kind}


def paths(objects) -> dict[str, str]:
    """Where each file of the project is, from the project's folder."""
    found = {}

    def walk(id: str, folder: str) -> None:
        item = objects[id]
        here = "" if item["sourceTree"] == "SOURCE_ROOT" else folder
        path = here + item.get("path", "")
        if item["isa"] == "PBXGroup":
            for child in item["children"]:
                walk(child, f"{path}/" if "path" in item else folder)
        elif item["sourceTree"] != "BUILT_PRODUCTS_DIR":
            found[id] = path

    walk(next(iter(of_kind(objects, "PBXProject").values()))["mainGroup"], "")
    return found


def files_of(objects, phase: str) -> list[str]:
    (files,) = (item["files"] for item in of_kind(objects, phase).values())
    return [paths(objects)[objects[id]["fileRef"]] for id in files if "fileRef" in objects[id]]


class TestProject:
    def test_every_reference_is_to_an_object(self, project, objects):
        ids = re.findall(r"\b[0-9A-F]{24}\b", (APP / "Reader.xcodeproj" / "project.pbxproj").read_text())
        assert set(ids) == set(objects)
        assert all(ids.count(id) >= 2 for id in objects)  # where it is, and where it is used
        assert objects[project["rootObject"]]["isa"] == "PBXProject"

    def test_every_file_is_there(self, objects):
        for path in paths(objects).values():
            assert path.startswith(MADE_BY_EXPORT) or (APP / path).exists(), path

    def test_what_is_exported_has_the_names_that_export_gives(self, objects):
        exported = sorted(path for path in paths(objects).values() if path.startswith(MADE_BY_EXPORT))
        package, *companions = sorted(exported, key=lambda path: "companions" in path)
        assert package == "Model/Reader.mlpackage"
        assert all(Path(path).parent.name == "Reader-companions" and Path(path).name in _FILES for path in companions)
        needed = {"tokenizer.json", "tokenizer_config.json", "source.safetensors", "generation_config.json"}
        assert {Path(path).name for path in companions} == needed
        assert "coreml" in (APP / "README.md").read_text()
        assert "Model/Reader.mlpackage" in (APP / "README.md").read_text()

    def test_all_swift_files_are_compiled_once(self, objects):
        sources = [path for path in files_of(objects, "PBXSourcesBuildPhase") if path.endswith(".swift")]
        on_disk = [
            str(path.relative_to(APP)) for room in ("ReaderCore", "Reader") for path in (APP / room).glob("*.swift")
        ]
        assert sorted(sources) == sorted(on_disk)

    def test_all_resources_are_copied(self, objects):
        resources = files_of(objects, "PBXResourcesBuildPhase")
        assert {"Reader/Localizable.xcstrings", "Reader/PrivacyInfo.xcprivacy"} <= set(resources)
        assert any(path.endswith(".txt") for path in resources)

    def test_the_swift_package(self, objects):
        manifest = (ROOT / "Package.swift").read_text()
        (package,) = of_kind(objects, "XCLocalSwiftPackageReference").values()
        assert (APP / package["relativePath"] / "Package.swift").samefile(ROOT / "Package.swift")
        (product,) = of_kind(objects, "XCSwiftPackageProductDependency").values()
        assert f'.library(name: "{product["productName"]}"' in manifest

    def test_the_settings(self, objects):
        manifest = (ROOT / "Package.swift").read_text()
        configurations = list(of_kind(objects, "XCBuildConfiguration").values())
        for settings in (c["buildSettings"] for c in configurations if "SDKROOT" in c["buildSettings"]):
            assert f".iOS(.v{settings['IPHONEOS_DEPLOYMENT_TARGET'].split('.')[0]})" in manifest
            assert f".macOS(.v{settings['MACOSX_DEPLOYMENT_TARGET'].split('.')[0]})" in manifest
            assert settings["SWIFT_VERSION"] == "6.0"
            assert settings["SUPPORTED_PLATFORMS"].split() == ["iphoneos", "iphonesimulator", "macosx"]
        for settings in (c["buildSettings"] for c in configurations if "SDKROOT" not in c["buildSettings"]):
            entitlements = plistlib.loads((APP / settings["CODE_SIGN_ENTITLEMENTS"]).read_bytes())
            assert entitlements["com.apple.security.app-sandbox"] is True


def test_the_privacy_manifest():
    manifest = plistlib.loads((APP / "Reader" / "PrivacyInfo.xcprivacy").read_bytes())
    assert manifest == {
        "NSPrivacyTracking": False,
        "NSPrivacyTrackingDomains": [],
        "NSPrivacyCollectedDataTypes": [],
        "NSPrivacyAccessedAPITypes": [],
    }


def test_nothing_in_the_app_wants_a_reason_in_the_privacy_manifest():
    """Apple's list: file timestamps, time since boot, disk space, the keyboards in use, UserDefaults."""
    interfaces = r"UserDefaults|AppStorage|ModificationDate|creationDate|systemUptime|volumeAvailable|activeInputModes"
    for file in (*APP.rglob("*.swift"), *(ROOT / "swift" / "Sources").rglob("*.swift")):
        assert not re.search(interfaces, file.read_text()), file


# ------------------------------------------------------------------------------------------------- texts

# Calls whose first text is shown, and so is looked up in the catalog.
SHOWN = (
    r"(?:Text|Button|Label|Section|TextField|ProgressView|alert|navigationTitle|accessibilityHint|accessibilityLabel)"
)

INSIDE = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"
VALUE = rf"\\\({INSIDE}\)"  # a value within a text


def keys_in_the_views() -> set[str]:
    found = set()
    for file in VIEWS:
        for text in re.findall(rf'{SHOWN}\("((?:[^"\\]|{VALUE})*)"', file.read_text()):
            found.add(re.sub(VALUE, lambda match: placeholder(match[0][2:-1]), text))
    return found


def placeholder(expression: str) -> str:
    """What Xcode writes for a value within a text: a whole number, or something that is text by then."""
    whole = ("tokens", "unreadTokens", "done", "total")
    return "%lld" if expression.split(".")[-1] in whole and "format" not in expression else "%@"


@pytest.fixture(scope="module")
def catalog() -> dict[str, Any]:
    return json.loads((APP / "Reader" / "Localizable.xcstrings").read_text(encoding="utf-8"))


def test_all_texts_are_in_the_catalog(catalog):
    keys = keys_in_the_views()
    assert len(keys) > 30
    assert keys == set(catalog["strings"])


def test_all_texts_are_translated(catalog):
    assert catalog["sourceLanguage"] == "en"
    for key, entry in catalog["strings"].items():
        unit = entry["localizations"]["de"]["stringUnit"]
        assert unit["state"] == "translated", key
        assert re.findall(r"%\w+|%@", unit["value"]) == re.findall(r"%\w+|%@", key), key


def test_texts_and_colours_are_the_systems():
    """Dynamic Type needs text styles, dark mode needs colours that change."""
    for file in VIEWS:
        text = file.read_text()
        assert not re.search(r"\.system\(size:|Font\.custom|\.custom\(", text), file
        assert not re.search(r"Color\(red|Color\(white|Color\(#|\.black|\.white|\.foregroundColor", text), file


def test_images_have_a_text_or_are_hidden():
    for file in VIEWS:
        for call in re.findall(r"Image\(systemName.*", file.read_text()):
            assert "accessibilityHidden(true)" in call or "accessibilityLabel" in call, file


@pytest.mark.skipif(shutil.which("swiftc") is None, reason="needs Swift")
def test_the_views_parse():
    """No more than that: what SwiftUI's types are only a Mac knows."""
    done = subprocess.run(["swiftc", "-frontend", "-parse", *VIEWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_views_are_small():
    assert max(len(file.read_text().splitlines()) for file in VIEWS) <= 150
