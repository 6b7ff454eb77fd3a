import Foundation

/// What an exported package says of its functions, read from the package itself.
struct PackageDescription {
    struct Feature: Equatable {
        let name: String
        let shape: [Int]
        let type: MLMultiArrayDataType
        /// What an input is where a call leaves it out; nil: no call may.
        let fallback: Float?
    }

    struct Function {
        let name: String
        let inputs: [Feature]
        let outputs: [Feature]
        let states: [Feature]
    }

    let functions: [Function]
    let metadata: [String: String]

    // Numbers of fields in Core ML's published `Model.proto` and `FeatureTypes.proto`.
    init(package: URL) throws {
        let file = package.appendingPathComponent("Data/com.apple.CoreML/model.mlmodel")
        let model = try ProtocolBuffer(Array(Data(contentsOf: file))[...])
        guard let description = try model.message(2) else { throw StandInError("\(package.lastPathComponent): no description") }
        var functions = try description.messages(20).map { function in
            Function(
                name: function.text(1), inputs: try Self.features(function, 2), outputs: try Self.features(function, 3),
                states: try Self.features(function, 6))
        }
        if functions.isEmpty {  // a package with one function has no list of them
            functions = [
                Function(
                    name: "main", inputs: try Self.features(description, 1),
                    outputs: try Self.features(description, 10), states: try Self.features(description, 13))
            ]
        }
        self.functions = functions
        let entries = try description.message(100)?.messages(100) ?? []
        metadata = Dictionary(entries.map { ($0.text(1), $0.text(2)) }) { $1 }
    }

    private static func features(_ message: ProtocolBuffer, _ field: Int) throws -> [Feature] {
        try message.messages(field).map { feature in
            let kind = try feature.message(3)
            let array = try kind?.message(5) ?? kind?.message(8)?.message(1)
            guard let array, let number = array.integer(2), let type = MLMultiArrayDataType(rawValue: number) else {
                throw StandInError("\(feature.text(1)) is no array")
            }
            return Feature(
                name: feature.text(1), shape: try array.list(1), type: type,
                fallback: kind?.integer(1000) == 1 ? array.float(51) : nil)
        }
    }
}

/// What the stand-in refuses, where Core ML would refuse it too or go wrong.
public struct StandInError: LocalizedError {
    public let errorDescription: String?

    init(_ what: String) {
        errorDescription = what
    }
}
