import TTTFormats
import TTTTestSupport
import XCTest

final class HalfTests: XCTestCase {
    func testEveryHalfComesBack() {
        for bits in UInt16.min...UInt16.max {
            let value = Half.float(bits)
            if value.isNaN {
                XCTAssertTrue(Half.float(Half.bits(value)).isNaN)
            } else if Half.bits(value) != bits {
                XCTFail("\(bits)")
            }
        }
    }

    func testRoundsAsTheProcessorDoes() {
        #if !(os(macOS) && arch(x86_64))
            var random = SystemRandomNumberGenerator()
            let edges: [Float] = [65519.996, 65520, 6.1e-5, 5.9604645e-08, 2.9802322e-08, 2.9802326e-08, -0.0, .infinity]
            let values = edges + (0..<20000).map { _ in Float(bitPattern: UInt32.random(in: 0...UInt32.max, using: &random)) }
            for value in values where !value.isNaN {
                XCTAssertEqual(Half.bits(value), Float16(value).bitPattern, "\(value)")
            }
        #endif
    }
}

final class JSONTests: XCTestCase {
    func testReadsValues() throws {
        let json = try JSON(#" {"a": [1, -2.5e3, true, null], "b": "x\n\u00e9\ud83d\ude42\ud800", "": {}} "#.utf8)
        XCTAssertEqual(json["a"]?.array?.map(\.number), [1, -2500, nil, nil])
        XCTAssertEqual(json["a"]?.array?[2].bool, true)
        XCTAssertEqual(json["b"]?.string, "x\né🙂\u{FFFD}")
        XCTAssertEqual(json[""]?.members?.count, 0)
    }

    func testTellsKeysApartByBytes() throws {
        let json = try JSON("{\"\u{E9}\": 1, \"e\u{301}\": 2}".utf8)
        XCTAssertEqual(json["\u{E9}"]?.int, 1)
        XCTAssertEqual(json["e\u{301}"]?.int, 2)
    }

    func testRefusesWhatIsNoJSON() {
        let deep = String(repeating: "[", count: 100_000)
        for text in ["", "{", "[1,]", "{\"a\":1,\"a\":2}", "1 2", "\"\u{1}\"", "tru", "\"\\u12\"", "nan", deep, "\"\\x\""] {
            XCTAssertThrowsError(try JSON(text.utf8), text) { error in
                guard case TTTError.damaged = error else { return XCTFail("\(error)") }
            }
        }
    }
}

final class SafetensorsTests: XCTestCase {
    func testReadsWhatItWrites() throws {
        var writer = SafetensorsWriter(metadata: ["k\"é🙂": "v\n"])
        writer.add("a", type: "F32", shape: [2, 1], bytes: littleEndian([1.5, -2] as [Float]))
        writer.add("n", type: "I32", shape: [], bytes: littleEndian(Int32(-7)))
        let file = try Safetensors(writer.encoded())
        XCTAssertEqual(file.metadata, ["k\"é🙂": "v\n"])
        XCTAssertEqual(try file.tensor("a"), Tensor(shape: [2, 1], values: [1.5, -2]))
        XCTAssertEqual(try file.integers("n"), [-7])
    }

    func testRefusesWhatIsDamaged() {
        func file(_ header: String, body: Int = 8) -> Data {
            littleEndian(UInt64(header.utf8.count)) + Data(header.utf8) + Data(count: body)
        }
        let tensor = #"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#
        XCTAssertNoThrow(try Safetensors(file(tensor)))
        XCTAssertThrowsError(try Safetensors(file(tensor, body: 7)))
        for (old, new) in [
            ("[2]", "[3]"), ("[2]", "[-2]"), ("[2]", "[4611686018427387904,4]"), ("F32", "F33"), ("[0,8]", "[8,0]"),
            ("[0,8]", "[-8,0]"), ("[0,8]", "[0]"), ("{\"dtype\"", "[\"dtype\""),
        ] {
            XCTAssertThrowsError(try Safetensors(file(tensor.replacingOccurrences(of: old, with: new))), new)
        }
        XCTAssertThrowsError(try Safetensors(Data(count: 7)))
        XCTAssertThrowsError(try Safetensors(Data(repeating: 0xFF, count: 16)))
    }
}
