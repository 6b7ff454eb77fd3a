import Foundation

public class MLMultiArrayConstraint: NSObject {
    public let shape: [NSNumber]
    public let dataType: MLMultiArrayDataType

    init(_ feature: PackageDescription.Feature) {
        shape = feature.shape.map { NSNumber(value: $0) }
        dataType = feature.type
    }
}

public class MLFeatureDescription: NSObject {
    public let name: String
    public let multiArrayConstraint: MLMultiArrayConstraint?

    init(_ feature: PackageDescription.Feature, isState: Bool) {
        name = feature.name
        multiArrayConstraint = isState ? nil : MLMultiArrayConstraint(feature)
    }
}

public struct MLModelMetadataKey: Hashable, Sendable {
    public static let creatorDefinedKey = MLModelMetadataKey()
}

public class MLModelDescription: NSObject {
    public let inputDescriptionsByName: [String: MLFeatureDescription]
    public let outputDescriptionsByName: [String: MLFeatureDescription]
    public let stateDescriptionsByName: [String: MLFeatureDescription]
    public let metadata: [MLModelMetadataKey: Any]

    init(_ function: PackageDescription.Function, metadata: [String: String]) {
        func byName(_ features: [PackageDescription.Feature], isState: Bool = false) -> [String: MLFeatureDescription] {
            Dictionary(uniqueKeysWithValues: features.map { ($0.name, MLFeatureDescription($0, isState: isState)) })
        }
        inputDescriptionsByName = byName(function.inputs)
        outputDescriptionsByName = byName(function.outputs)
        stateDescriptionsByName = byName(function.states, isState: true)
        self.metadata = [.creatorDefinedKey: metadata]
    }
}
