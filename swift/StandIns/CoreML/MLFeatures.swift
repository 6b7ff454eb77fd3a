import Foundation

public class MLFeatureValue: NSObject {
    public let multiArrayValue: MLMultiArray?

    public init(multiArray value: MLMultiArray) {
        multiArrayValue = value
    }
}

public protocol MLFeatureProvider {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

public class MLDictionaryFeatureProvider: NSObject, MLFeatureProvider {
    private let features: [String: MLFeatureValue]

    public init(dictionary: [String: Any]) throws {
        features = try dictionary.mapValues { value in
            guard let feature = value as? MLFeatureValue else { throw StandInError("a feature is no MLFeatureValue") }
            return feature
        }
    }

    public var featureNames: Set<String> { Set(features.keys) }

    public func featureValue(for featureName: String) -> MLFeatureValue? {
        features[featureName]
    }
}
