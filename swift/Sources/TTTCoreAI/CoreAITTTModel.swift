// macOS 27, the first with Core AI, runs on Apple silicon only, and Macs with Intel processors have no `Float16`.
#if canImport(CoreAI) && !(arch(x86_64) && !os(Linux))
import CoreAI
import Foundation
import TTTFormats
import TTTKit

/// A TTT model in a Core AI bundle, the folder that `convert.py coreai` writes.
///
/// It calls the bundle's `main`, which reads any number of tokens at any place of a text and keeps its state in three
/// arrays. (`decode` and `prefill` keep one for each layer and part. Views of so many arrays at once ask for parts of
/// Swift that are not settled yet.)
@available(macOS 27, iOS 27, tvOS 27, visionOS 27, watchOS 27, *)
public actor CoreAITTTModel: TTTModel {
    /// What the package says of itself.
    public nonisolated let info: TTTModelInfo
    private let function: InferenceFunction
    private let layout: StateLayout
    private let groups: StateGroups
    private let start: [LayerState]
    private let scalarType: NDArray.ScalarType
    /// Nil while a call runs, and after one has failed.
    private var arrays: Arrays?

    /// The states of `main`. Only one call at a time has them.
    private struct Arrays: @unchecked Sendable {
        var weights: NDArray
        var inputs: NDArray
        var errors: NDArray

        static let names = ["tttWeights", "tttInputs", "tttErrors"]

        var all: [NDArray] { [weights, inputs, errors] }
    }

    /// Loads a bundle. The first time on a device Core AI compiles it, which takes a while.
    ///
    /// - Parameters:
    ///   - bundle: the folder, with `metadata.json`, the program, and `source.safetensors`.
    ///   - options: for which compute unit the program is compiled: the GPU, unless measured otherwise on the device.
    /// - Throws: `TTTError.unreadableFile`, or `.notATTTPackage` for a folder that is no such bundle.
    public init(
        bundle: URL, options: SpecializationOptions = SpecializationOptions(preferredComputeUnitKind: .gpu)
    ) async throws {
        let source = try ModelSource(contentsOf: bundle.appendingPathComponent("source.safetensors"))
        try await self.init(bundle: bundle, source: source, options: options)
    }

    init(
        bundle: URL, source: ModelSource,
        options: SpecializationOptions = SpecializationOptions(preferredComputeUnitKind: .gpu)
    ) async throws {
        let description = try BundleDescription(bundle)
        let function: InferenceFunction?
        do {
            let model = try await AIModel(contentsOf: description.asset, options: options)
            function = try model.loadFunction(named: "main")
        } catch {
            throw TTTError.unreadableFile(description.asset.lastPathComponent, error.localizedDescription)
        }
        guard let function else { throw TTTError.notATTTPackage("it has no function main") }
        var info = try TTTModelInfo(metadata: description.facts, source: source)
        (info.learningShape, info.givesSignals) = (nil, false)  // those are of `decode` and `prefill`
        self.info = info
        let state = try JSON((description.facts["com.mlx-ttt.state"] ?? "null").utf8)
        layout = try StateLayout(state)
        groups = try StateGroups(state, layout: layout)
        start = try layout.start(weights: source.startWeights)
        scalarType = try Self.scalarType(of: function.descriptor, groups)
        self.function = function
        arrays = try Self.zeros(groups, scalarType)
    }

    /// Reads up to `info.prefillTokens` tokens at the start of a mini-batch; see `TTTModel`.
    ///
    /// - Throws: what the framework throws; then the state is lost, and `restore` or `reset` comes next.
    public func prefill(_ block: [Int], length: Int) async throws -> [Float] {
        try await read(Array(block.prefix(length)), position: 0)
    }

    /// Reads one token; see `TTTModel`.
    ///
    /// - Throws: as `prefill`.
    public func decode(_ token: Int, position: Int) async throws -> [Float] {
        try await read([token], position: position)
    }

    /// The state in float32, one per layer; see `TTTModel`. The package has changes of the weights, in its own
    /// precision.
    public func state(position: Int) throws -> [LayerState] {
        guard let arrays else { throw TTTError.stateLost }
        let values = Dictionary(uniqueKeysWithValues: zip(Arrays.names, arrays.all.map(Self.numbers)))
        return layout.unpack(groups.together(values), start: start, offset: position)
    }

    /// Takes up a state, rounded to the precision of the package; see `TTTModel`.
    ///
    /// - Throws: `TTTError.stateOfAnotherModel`.
    public func restore(_ state: [LayerState]) throws {
        guard state.count == start.count, zip(state, start).allSatisfy({ $0.hasShape(of: $1) }) else {
            throw TTTError.stateOfAnotherModel
        }
        let values = groups.apart(layout.pack(state, start: start))
        arrays = try Self.arrays(groups, scalarType) { values[$0.name] ?? [] }
    }

    /// Back to the state before the first token.
    public func reset() throws {
        arrays = try Self.zeros(groups, scalarType)
    }

    // MARK: - Calling the model

    /// - Parameter position: of the first token in its mini-batch.
    private func read(_ tokens: [Int], position: Int) async throws -> [Float] {
        var (weights, inputs, errors) = Self.apart(try takeArrays())
        var states = InferenceFunction.MutableViews()
        states.insert(&weights, for: Arrays.names[0])
        states.insert(&inputs, for: Arrays.names[1])
        states.insert(&errors, for: Arrays.names[2])
        // Of the positions `main` looks at the number alone, modulo the mini-batch size.
        let positions = (0..<Int32(position + tokens.count))
        var outputs = try await function.run(
            inputs: [
                "input_ids": NDArray(scalars: tokens.map { Int32($0) }, shape: [1, tokens.count]),
                "position_ids": NDArray(scalars: positions, shape: [1, positions.count]),
            ],
            states: consume states)
        arrays = Arrays(weights: weights, inputs: inputs, errors: errors)
        guard let logits = outputs.remove("logits")?.ndArray else { throw TTTError.unexpectedOutput("no logits") }
        let shape = [1, tokens.count, info.vocabularySize]
        guard logits.shape == shape, logits.scalarType == .float16 else {
            throw TTTError.unexpectedOutput("logits \(logits.shape), expected \(shape) in float16")
        }
        return Array(Self.numbers(logits).suffix(info.vocabularySize))
    }

    /// For a call, which has the only reference to them then: writing in place copies nothing.
    private func takeArrays() throws -> Arrays {
        guard let taken = arrays else { throw TTTError.stateLost }
        arrays = nil
        return taken
    }

    private static func apart(_ arrays: Arrays) -> (weights: NDArray, inputs: NDArray, errors: NDArray) {
        (arrays.weights, arrays.inputs, arrays.errors)
    }

    // MARK: - The state

    private static func scalarType(of function: InferenceFunctionDescriptor, _ groups: StateGroups) throws
        -> NDArray.ScalarType
    {
        var types: Set<NDArray.ScalarType> = []
        for group in groups.groups {
            guard case .ndArray(let descriptor) = function.stateDescriptor(of: group.name),
                descriptor.shape == group.shape
            else { throw TTTError.notATTTPackage("its state \(group.name) is not that of its metadata") }
            types.insert(descriptor.scalarType)
        }
        guard groups.groups.map(\.name).sorted() == Arrays.names.sorted(), types.count == 1, let type = types.first,
            [.float16, .float32].contains(type)
        else { throw TTTError.notATTTPackage("its states are not those of main") }
        return type
    }

    private static func arrays(
        _ groups: StateGroups, _ type: NDArray.ScalarType, _ numbers: (StateGroups.Group) -> [Float]
    ) throws -> Arrays {
        func array(_ name: String) throws -> NDArray {
            guard let group = groups.groups.first(where: { $0.name == name }) else {
                throw TTTError.notATTTPackage("it has no state \(name)")
            }
            var array = NDArray(shape: group.shape, scalarType: type)
            fill(&array, with: numbers(group))
            return array
        }
        return Arrays(
            weights: try array(Arrays.names[0]), inputs: try array(Arrays.names[1]), errors: try array(Arrays.names[2]))
    }

    /// The state before the first token.
    private static func zeros(_ groups: StateGroups, _ type: NDArray.ScalarType) throws -> Arrays {
        try arrays(groups, type) { [Float](repeating: 0, count: $0.count) }
    }

    /// In row-major order.
    private static func numbers(_ array: NDArray) -> [Float] {
        var numbers: [Float] = []
        numbers.reserveCapacity(array.shape.reduce(1, *))
        let runs = StridedMemory(shape: array.shape, strides: array.strides).runs
        if array.scalarType == .float16 {
            array.view(as: Float16.self).withUnsafePointer { memory, _, _ in
                for run in runs {
                    for i in run.inMemory..<run.inMemory + run.count { numbers.append(Float(memory[i])) }
                }
            }
        } else {
            array.view(as: Float.self).withUnsafePointer { memory, _, _ in
                for run in runs { for i in run.inMemory..<run.inMemory + run.count { numbers.append(memory[i]) } }
            }
        }
        return numbers
    }

    private static func fill(_ array: inout NDArray, with numbers: [Float]) {
        let runs = StridedMemory(shape: array.shape, strides: array.strides).runs
        if array.scalarType == .float16 {
            let view = array.mutableView(as: Float16.self)
            view.withUnsafeMutablePointer { memory, _, _ in
                for run in runs {
                    for i in 0..<run.count { memory[run.inMemory + i] = Float16(numbers[run.packed + i]) }
                }
            }
        } else {
            let view = array.mutableView(as: Float.self)
            view.withUnsafeMutablePointer { memory, _, _ in
                for run in runs { for i in 0..<run.count { memory[run.inMemory + i] = numbers[run.packed + i] } }
            }
        }
    }
}

/// What the `metadata.json` of a bundle says.
private struct BundleDescription {
    let asset: URL
    /// The entries that the exporter put there for an app, by key.
    let facts: [String: String]

    init(_ bundle: URL) throws {
        let content: JSON
        do {
            content = try JSON(Data(contentsOf: bundle.appendingPathComponent("metadata.json")))
        } catch {
            throw TTTError.unreadableFile("metadata.json", error.localizedDescription)
        }
        guard let name = content["assets"]?["main"]?.string, let members = content["user_data"]?.members else {
            throw TTTError.notATTTPackage("metadata.json is not of `convert.py coreai`")
        }
        asset = bundle.appendingPathComponent(URL(fileURLWithPath: name).lastPathComponent)
        facts = Dictionary(members.map { ($0.key, $0.value.string ?? "") }) { $1 }
    }
}
#endif
