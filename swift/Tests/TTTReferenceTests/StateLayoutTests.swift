import TTTFormats
import TTTTestSupport
import XCTest

final class StateLayoutTests: XCTestCase {
    private func layers(_ file: Safetensors, _ name: String, weights: Int, offset: Int) throws -> [LayerState] {
        try (0..<2).map { layer in
            let prefix = "\(name).\(layer)."
            let histories = file.names.filter { $0.hasPrefix(prefix + "history.") }
            return LayerState(
                offset: offset, weights: try (0..<weights).map { try file.tensor("\(prefix)weights.\($0)") },
                rows: try file.tensor(prefix + "rows"),
                history: Dictionary(
                    uniqueKeysWithValues: try histories.map {
                        (String($0.dropFirst((prefix + "history.").count)), try file.tensor($0))
                    }))
        }
    }

    func testPacksAStateAsPythonDoes() throws {
        for (kind, weights) in [("linear", 2), ("mlp", 4)] {
            let file = try Files.arrays("layout-\(kind).safetensors")
            let layout = try StateLayout(JSON(XCTUnwrap(file.metadata["layout"]).utf8))
            let packed = try file.tensor("packed")
            XCTAssertEqual(layout.shape, packed.shape)
            let start = try layers(file, "start", weights: weights, offset: 0)
            let now = try layers(file, "now", weights: weights, offset: 7)
            XCTAssertEqual(layout.pack(now, start: start), packed.values)
            let unpacked = layout.unpack(packed.values, start: start, offset: 7)
            for (layer, expected) in zip(unpacked, now) {
                XCTAssertTrue(layer.hasShape(of: expected))
                XCTAssertEqual(layer.rows, expected.rows)
                XCTAssertEqual(layer.history, expected.history)
                XCTAssertEqual(layer.offset, 7)
                for (a, b) in zip(layer.weights, expected.weights) {
                    XCTAssertLessThan(zip(a.values, b.values).map { abs($0 - $1) }.max() ?? 1, 1e-6)
                }
            }
            let empty = try layout.start(weights: start.map(\.weights))
            XCTAssertTrue(zip(empty, start).allSatisfy { $0.hasShape(of: $1) })
            XCTAssertTrue(layout.pack(empty, start: start).allSatisfy { $0 == 0 })
        }
    }

    func testGroupsAreThoseOfPython() throws {
        for kind in ["linear", "mlp"] {
            let file = try Files.arrays("layout-\(kind).safetensors")
            let description = try JSON(XCTUnwrap(file.metadata["layout"]).utf8)
            let groups = try StateGroups(description, layout: StateLayout(description))
            let packed = try file.tensor("packed").values
            let found = groups.apart(packed)
            XCTAssertEqual(found.count, 3)
            for group in groups.groups {
                let expected = try file.tensor("grouped.\(group.name)")
                XCTAssertEqual(group.shape, expected.shape, group.name)
                XCTAssertEqual(found[group.name], expected.values, group.name)
            }
            XCTAssertEqual(groups.together(found), packed)
        }
    }

    func testRefusesWhatAreNoGroups() throws {
        let text = try XCTUnwrap(Files.arrays("layout-mlp.safetensors").metadata["layout"])
        let layout = try StateLayout(JSON(text.utf8))
        for (old, new) in [
            ("\"groups\"", "\"group\""), ("[\"W1\", ", "[\"W9\", "), ("[\"W1\", ", "["), ("[\"e1\"", "[\"W1\""),
        ] {
            XCTAssertTrue(text.contains(old), text)
            let changed = try JSON(text.replacingOccurrences(of: old, with: new).utf8)
            XCTAssertThrowsError(try StateGroups(changed, layout: layout), new)
        }
    }

    func testRefusesWhatIsNoLayout() throws {
        let text = try XCTUnwrap(Files.arrays("layout-mlp.safetensors").metadata["layout"])
        for (old, new) in [("\"W2\"", "\"W3\""), ("\"head_dim\": 8", "\"head_dim\": 6"), ("\"shape\": [2", "\"shape\": [0")] {
            XCTAssertTrue(text.contains(old), text)
            XCTAssertThrowsError(try StateLayout(JSON(text.replacingOccurrences(of: old, with: new).utf8)), new)
        }
    }
}
