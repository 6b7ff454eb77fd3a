import Foundation
import TTTFormats

public struct InferenceFunctionDescriptor: Sendable {
    public let name: String
    let inputs: [String: NDArrayDescriptor]
    let outputs: [String: NDArrayDescriptor]
    let states: [String: NDArrayDescriptor]

    public var inputNames: [String] { inputs.keys.sorted() }
    public var outputNames: [String] { outputs.keys.sorted() }
    public var stateNames: [String] { states.keys.sorted() }

    public func inputDescriptor(of name: String) -> InferenceValue.Descriptor? { inputs[name].map { .ndArray($0) } }
    public func outputDescriptor(of name: String) -> InferenceValue.Descriptor? { outputs[name].map { .ndArray($0) } }
    public func stateDescriptor(of name: String) -> InferenceValue.Descriptor? { states[name].map { .ndArray($0) } }

    init(name: String, _ json: JSON) throws {
        func descriptors(_ kind: String) throws -> [String: NDArrayDescriptor] {
            let pairs = try (json[kind]?.members ?? []).map { member in
                let shape = (member.value["shape"]?.array ?? []).compactMap(\.int)
                guard let type = NDArray.ScalarType(name: member.value["type"]?.string) else {
                    throw StandInError("\(member.key) has a scalar type that is not known here")
                }
                return (member.key, NDArrayDescriptor(shape: shape, scalarType: type))
            }
            return Dictionary(uniqueKeysWithValues: pairs)
        }
        self.name = name
        (inputs, outputs, states) = (try descriptors("inputs"), try descriptors("outputs"), try descriptors("states"))
    }
}

public struct InferenceFunction: Sendable {
    public let descriptor: InferenceFunctionDescriptor
    let interpreter: Interpreter

    /// Arrays that a call writes in place. They cannot be touched while it lives, nor can it outlive them.
    public struct MutableViews: ~Copyable, ~Escapable {
        private(set) var arrays: [String: NDArray] = [:]

        @_lifetime(immortal)
        public init() {}

        // Core AI takes whatever can be viewed; TTTKit has arrays.
        @_lifetime(self: copy self, &value)
        public mutating func insert(_ value: inout NDArray, for name: String) {
            value.makeUnique()
            arrays[name] = value
        }
    }

    public struct Outputs: ~Copyable {
        private var arrays: [String: NDArray]

        init(_ arrays: [String: NDArray]) {
            self.arrays = arrays
        }

        public mutating func remove(_ name: String) -> InferenceValue? {
            arrays.removeValue(forKey: name).map { InferenceValue($0) }
        }
    }

    public func run(
        inputs: [String: NDArray], states: consuming MutableViews = MutableViews(),
        outputViews: consuming MutableViews = MutableViews()
    ) async throws -> Outputs {
        try check(inputs, descriptor.inputs, "input")
        try check(states.arrays, descriptor.states, "state")
        guard outputViews.arrays.isEmpty else { throw StandInError("outputs in place are not known here") }
        await StandIn.shared.predictionBegins()
        return Outputs(try interpreter.run(inputs, states: states.arrays))
    }

    /// They must be those that the program describes.
    private func check(_ given: [String: NDArray], _ wanted: [String: NDArrayDescriptor], _ what: String) throws {
        guard Set(given.keys) == Set(wanted.keys) else {
            throw StandInError("\(descriptor.name) has \(what)s \(wanted.keys.sorted()), not \(given.keys.sorted())")
        }
        for (name, array) in given {
            guard let shape = wanted[name]?.shape, array.shape.count == shape.count,
                zip(array.shape, shape).allSatisfy({ $0 == $1 || $1 < 0 && $0 > 0 })
            else { throw StandInError("\(name) is \(array.shape), expected \(wanted[name]?.shape ?? [])") }
            guard array.scalarType == wanted[name]?.scalarType else {
                throw StandInError("\(name) holds \(array.scalarType)")
            }
        }
    }
}
