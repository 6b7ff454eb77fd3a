import Foundation
import TTTFormats

public struct ComputeUnitKind: Hashable, Sendable {
    private let name: String

    public static let cpu = ComputeUnitKind(name: "cpu")
    public static let gpu = ComputeUnitKind(name: "gpu")
    public static let neuralEngine = ComputeUnitKind(name: "neuralEngine")
}

public struct SpecializationOptions: Sendable {
    public static var `default`: SpecializationOptions { SpecializationOptions(preferredComputeUnitKind: nil) }

    public let preferredComputeUnitKind: ComputeUnitKind?

    public init(preferredComputeUnitKind: ComputeUnitKind?) {
        self.preferredComputeUnitKind = preferredComputeUnitKind
    }
}

/// Its functions are those of `interface.json`, which is what Apple's runtime said of the program. That is not there.
public struct AIModel: Sendable {
    private let descriptors: [String: InferenceFunctionDescriptor]
    private let interpreter: Interpreter

    public init(contentsOf modelURL: URL, options: SpecializationOptions = .default) async throws {
        let interface = try JSON(Data(contentsOf: modelURL.appendingPathComponent("interface.json")))
        let pairs = try (interface.members ?? []).map {
            ($0.key, try InferenceFunctionDescriptor(name: $0.key, $0.value))
        }
        descriptors = Dictionary(uniqueKeysWithValues: pairs)
        interpreter = try Interpreter(bundle: modelURL.deletingLastPathComponent())
    }

    public var functionNames: [String] { descriptors.keys.sorted() }

    public func functionDescriptor(for functionName: String) -> InferenceFunctionDescriptor? {
        descriptors[functionName]
    }

    public func loadFunction(named functionName: String) throws -> InferenceFunction? {
        descriptors[functionName].map { InferenceFunction(descriptor: $0, interpreter: interpreter) }
    }
}
