import TTTFormats
import TTTReference
import XCTest

@testable import TTTKit
import TTTTestSupport

final class StateFileTests: XCTestCase {
    private let file = Files.fixture("small/python.state")

    func testReadsWhatPythonWrote() throws {
        let state = try TextState(contentsOf: file)
        XCTAssertEqual(state.layers.count, 2)
        XCTAssertEqual(state.tokens.count, 8)
        XCTAssertGreaterThan(state.position, 10)
        XCTAssertNil(state.weights)
        let tokenizer = try JSONTokenizer(folder: Files.fixture("small"))
        XCTAssertEqual(
            state.fingerprint,
            try Fingerprint.of(directory: Files.fixture("small"), vocabulary: tokenizer.vocabulary))
    }

    func testFingerprintIsPythons() throws {
        let tokenizer = try JSONTokenizer(folder: Files.bundled)
        let expected = try Files.json("linear.json")["fingerprint"]?.string
        XCTAssertEqual(try Fingerprint.of(directory: Files.bundled, vocabulary: tokenizer.vocabulary), expected)
    }

    /// The same arrays and metadata, the digest included, which Python checks.
    func testWritesWhatPythonWould() throws {
        let theirs = try Safetensors(contentsOf: file)
        let ours = try Safetensors(StateFile.encoded(TextState(contentsOf: file)))
        XCTAssertEqual(ours.metadata, theirs.metadata)
        XCTAssertEqual(ours.names, theirs.names)
        for name in ours.names {
            XCTAssertEqual(ours.shape(of: name), theirs.shape(of: name), name)
            if !name.contains("offset") { XCTAssertEqual(try ours.tensor(name), try theirs.tensor(name), name) }
        }
    }

    func testWhatOnlySwiftKeepsComesBack() throws {
        var state = try TextState(contentsOf: file)
        state.pending = [3, 4]
        state.weights = "int8"
        XCTAssertEqual(try StateFile.decoded(StateFile.encoded(state)), state)
    }

    func testADamagedFileIsRefused() throws {
        let data = try Data(contentsOf: file)
        for count in [0, 7, 8, 200, data.count - 1] {
            XCTAssertThrowsError(try StateFile.decoded(data.prefix(count)), "\(count) bytes")
        }
        for index in stride(from: data.count - 1, to: data.count - 6000, by: -97) {
            var damaged = data
            damaged[index] ^= 1
            XCTAssertThrowsError(try StateFile.decoded(damaged)) { error in
                XCTAssertEqual(error as? TTTError, .damagedState)
            }
        }
        XCTAssertThrowsError(try TextState(contentsOf: Files.bundled.appendingPathComponent("model.safetensors"))) {
            XCTAssertEqual($0 as? TTTError, .notAState)
        }
    }

    func testRefusesWhatANewerVersionWrote() throws {
        let state = SafetensorsWriter(metadata: ["0.mlx_ttt": "3"])
        XCTAssertThrowsError(try StateFile.decoded(state.encoded())) { error in
            XCTAssertTrue(error.localizedDescription.contains("newer version"), error.localizedDescription)
        }
        let source = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID()).safetensors")
        defer { try? FileManager.default.removeItem(at: source) }
        for (format, refused) in [("2", true), ("x", true), ("1", false)] {
            let written = SafetensorsWriter(metadata: ["fingerprint": "a", "model": "b", "format": format])
            try written.encoded().write(to: source)
            if refused {
                XCTAssertThrowsError(try ModelSource(contentsOf: source)) { error in
                    XCTAssertEqual(error as? TTTError, .formatVersion(Int(format) ?? 0))
                }
            } else {
                XCTAssertNoThrow(try ModelSource(contentsOf: source))
            }
        }
    }
}

final class SHA256Tests: XCTestCase {
    func testExamplesOfTheStandard() {
        for (text, digest) in [
            ("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (
                "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
                "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
            ),
            (String(repeating: "a", count: 1000), "41edece42d63e8d9bf515a9ba6932e1c20cbc9f5a5d134645adb5db1b9737ea3"),
        ] {
            var whole = SHA256()
            whole.update(text.utf8)
            XCTAssertEqual(whole.hexDigest(), digest)
            var parts = SHA256()
            for byte in text.utf8 { parts.update([byte]) }
            XCTAssertEqual(parts.hexDigest(), digest)
        }
    }
}
