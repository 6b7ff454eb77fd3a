import Foundation

public class MLModel: NSObject {
    public let modelDescription: MLModelDescription
    private let function: PackageDescription.Function
    private let interpreter: Interpreter

    public init(contentsOf url: URL, configuration: MLModelConfiguration) throws {
        let package = try PackageDescription(package: url)
        let name = configuration.functionName ?? package.functions.first?.name
        guard let function = package.functions.first(where: { $0.name == name }) else {
            throw StandInError("\(url.lastPathComponent): no function \(name ?? "")")
        }
        self.function = function
        modelDescription = MLModelDescription(function, metadata: package.metadata)
        interpreter = try Interpreter(package: url, metadata: package.metadata)
        StandIn.shared.functionIsLoaded()
    }

    public func makeState() -> MLState {
        MLState(function.states)
    }

    public func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider {
        guard function.states.isEmpty else { throw StandInError("\(function.name) needs a state") }
        let arrays = try checked(input)
        guard let state = arrays["tttState"] else { throw StandInError("\(function.name) has no tttState") }
        let result = try interpreter.run(arrays, state: state.scalars(as: UInt16.self), phase: nil)
        return try outputs(["logits": result.logits, "tttStateOut": result.state], result.signals)
    }

    public func prediction(from inputFeatures: any MLFeatureProvider, using state: MLState) throws
        -> any MLFeatureProvider
    {
        guard !function.states.isEmpty else { throw StandInError("\(function.name) takes no state") }
        return try state.alone {
            let arrays = try checked(inputFeatures)
            guard Set(state.arrays.keys) == Set(function.states.map(\.name)), let array = state.arrays["tttState"] else {
                throw StandInError("a state of another model")
            }
            StandIn.shared.predictionBegins()
            let result = try interpreter.run(arrays, state: array.scalars(as: UInt16.self), phase: state.phase)
            array.fill(result.state)
            state.phase = result.phase
            return try outputs(["logits": result.logits], result.signals)
        }
    }

    /// The inputs by name. They must be those that the package describes.
    private func checked(_ provider: any MLFeatureProvider) throws -> [String: MLMultiArray] {
        let required = Set(function.inputs.filter { $0.fallback == nil }.map(\.name))
        guard provider.featureNames.isSuperset(of: required),
            provider.featureNames.isSubset(of: function.inputs.map(\.name))
        else {
            throw StandInError("\(function.name) takes \(function.inputs.map(\.name)), not \(provider.featureNames.sorted())")
        }
        var arrays: [String: MLMultiArray] = [:]
        for input in function.inputs {
            if let value = input.fallback, !provider.featureNames.contains(input.name) {
                guard input.type == .float32 else { throw StandInError("\(input.name) has a default of another type") }
                let array = MLMultiArray(shape: input.shape, type: .float32, gap: 0)
                array.fill([UInt32](repeating: value.bitPattern, count: array.count))
                arrays[input.name] = array
                continue
            }
            guard let array = provider.featureValue(for: input.name)?.multiArrayValue else {
                throw StandInError("\(input.name) is no array")
            }
            guard array.shape.map(\.intValue) == input.shape else {
                throw StandInError("\(input.name) is \(array.shape), expected \(input.shape)")
            }
            guard array.dataType == input.type else {
                throw StandInError("\(input.name) holds \(array.dataType), expected \(input.type)")
            }
            arrays[input.name] = array
        }
        return arrays
    }

    /// The outputs that the package describes: halves in float16, numbers in float32.
    private func outputs(_ halves: [String: [UInt16]], _ numbers: [String: [Float]]) throws -> any MLFeatureProvider {
        let features = try function.outputs.map { output in
            let array = MLMultiArray(shape: output.shape, type: output.type, gap: 0)
            if let scalars = halves[output.name], scalars.count == array.count, output.type == .float16 {
                array.fill(scalars)
            } else if let scalars = numbers[output.name], scalars.count == array.count, output.type == .float32 {
                array.fill(scalars.map(\.bitPattern))
            } else {
                throw StandInError("the package describes another output \(output.name)")
            }
            return (output.name, MLFeatureValue(multiArray: array))
        }
        return try MLDictionaryFeatureProvider(dictionary: Dictionary(uniqueKeysWithValues: features))
    }
}
