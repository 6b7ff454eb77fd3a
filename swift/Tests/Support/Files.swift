import Foundation
import TTTFormats

/// What the tests compare with. `python -m tests.export.swift_fixtures` writes the fixtures.
package enum Files {
    package static let root = URL(fileURLWithPath: #filePath)
        .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
    package static let bundled = root.appendingPathComponent("mlx_ttt/models/shakespeare-ttt-linear")

    package static func golden(_ name: String) -> URL {
        root.appendingPathComponent("tests/data/golden/\(name)")
    }

    package static func fixture(_ name: String) -> URL {
        root.appendingPathComponent("swift/Tests/Fixtures/\(name)")
    }

    package static func json(_ name: String) throws -> JSON {
        try JSON(Data(contentsOf: fixture(name)))
    }

    package static func arrays(_ name: String) throws -> Safetensors {
        try Safetensors(contentsOf: fixture(name))
    }
}

extension JSON {
    /// A list of integers, empty for anything else.
    package var integers: [Int] {
        array?.compactMap(\.int) ?? []
    }
}
