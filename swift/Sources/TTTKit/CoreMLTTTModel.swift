#if canImport(CoreML)
import CoreML
import Foundation
import TTTFormats

/// A TTT model in a Core ML package.
public actor CoreMLTTTModel: TTTModel {
    /// What the package says of itself.
    public nonisolated let info: TTTModelInfo
    private let decoder: MLModel
    /// Nil after `giveBackMemory`, until it is needed.
    private var prefiller: MLModel?
    private let loadPrefiller: @Sendable () throws -> MLModel
    private let layout: StateLayout
    private let start: [LayerState]
    private var memory: Memory
    /// The learning scale, if the package takes one. Core ML would take 1 where it is left out; it never is.
    private var learning: MLMultiArray?
    /// The signals of the last call by name, and how many of its tokens count.
    private var shown: (arrays: [String: MLMultiArray], length: Int)?

    /// What the model keeps from call to call.
    private enum Memory {
        /// Core ML keeps it, for both functions of a package.
        case shared(MLState)
        /// Core ML keeps it, for each of two packages; the one called last has the latest.
        case separate(forDecode: MLState, forPrefill: MLState, latestIsDecode: Bool)
        /// It is an input and an output of the model.
        case array(MLMultiArray)
    }

    private static let stateName = "tttState"
    private static let nextStateName = "tttStateOut"
    private static let bytesPerScalar = 2  // float16

    /// Loads a compiled package. Takes seconds the first time on a device: `load` does it in the background.
    ///
    /// - Parameters:
    ///   - url: the compiled package (`.mlmodelc`).
    ///   - source: of the package, from the `source.safetensors` beside it.
    ///   - prefill: the compiled package with `prefill` alone, where the two were exported with `--separate`.
    ///   - computeUnits: `.cpuAndGPU`, unless measured otherwise on the device.
    public init(
        contentsOf url: URL, source: ModelSource, prefill: URL? = nil, computeUnits: MLComputeUnits = .cpuAndGPU
    ) throws {
        @Sendable func load(_ url: URL, function: String) throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = computeUnits
            configuration.functionName = prefill == nil ? function : nil
            do {
                return try MLModel(contentsOf: url, configuration: configuration)
            } catch {
                throw TTTError.unreadableFile(url.lastPathComponent, error.localizedDescription)
            }
        }
        let decoder = try load(url, function: "decode")
        let loadPrefiller: @Sendable () throws -> MLModel = { try load(prefill ?? url, function: "prefill") }
        let prefiller = try loadPrefiller()
        let metadata = decoder.modelDescription.metadata[.creatorDefinedKey] as? [String: String]
        info = try TTTModelInfo(metadata: metadata ?? [:], source: source)
        layout = try StateLayout(JSON((metadata?["com.mlx-ttt.state"] ?? "null").utf8))
        start = try layout.start(weights: source.startWeights)
        memory = try Self.empty(decoder: decoder, prefiller: prefiller, isSeparate: prefill != nil)
        if let shape = info.learningShape {
            guard shape == [layout.layers, layout.heads] else {
                throw TTTError.notATTTPackage("its learning scale is not of the layers and heads of its state")
            }
            learning = Self.numbers([Float](repeating: 1, count: shape.reduce(1, *)), shape: shape)
        }
        self.decoder = decoder
        (self.prefiller, self.loadPrefiller) = (prefiller, loadPrefiller)
    }

    /// Loads a compiled package in the background; see `init`.
    public static func load(
        contentsOf url: URL, source: ModelSource, prefill: URL? = nil, computeUnits: MLComputeUnits = .cpuAndGPU
    ) async throws -> CoreMLTTTModel {
        try await Task.detached {
            try CoreMLTTTModel(contentsOf: url, source: source, prefill: prefill, computeUnits: computeUnits)
        }.value
    }

    /// Reads up to `info.prefillTokens` tokens at the start of a mini-batch; see `TTTModel`.
    ///
    /// - Throws: what the framework throws; then the state is lost, and `restore` or `reset` comes next.
    public func prefill(_ block: [Int], length: Int) throws -> [Float] {
        let tokens = Self.integers(block, shape: [1, block.count])
        let inputs = ["inputIds": tokens, "length": Self.integers([length], shape: [1])]
        return try predict(inputs, isDecode: false, length: length)
    }

    /// Reads one token; see `TTTModel`.
    ///
    /// - Throws: as `prefill`.
    public func decode(_ token: Int, position: Int) throws -> [Float] {
        let tokens = Self.integers([token], shape: [1, 1])
        let inputs = ["inputIds": tokens, "position": Self.integers([position], shape: [1])]
        return try predict(inputs, isDecode: true, length: 1)
    }

    /// Multiplies the learning rates of the tokens to come; see `TTTModel`.
    ///
    /// - Throws: `TTTError.noLearningScale` for a package that was exported without `--learning`; `.invalidOption`.
    public func setLearning(_ scale: Tensor) throws {
        try info.check(learning: scale)
        learning = Self.numbers(scale.values, shape: scale.shape)
    }

    /// What the layers did with each token of the last call; see `TTTModel`.
    ///
    /// - Throws: `TTTError.noSignals` for a package that was exported without `--signals`.
    public func signals() throws -> [TTTSignals] {
        guard info.givesSignals else { throw TTTError.noSignals }
        guard let shown else { return [] }
        let loss = try Self.byToken("loss", shown.arrays, length: shown.length)
        let rate = try Self.byToken("lr", shown.arrays, length: shown.length)
        let norm = try Self.byToken("writeNorm", shown.arrays, length: shown.length)
        guard loss.count == rate.count, loss.count == norm.count else {
            throw TTTError.unexpectedOutput("signals of several shapes")
        }
        return loss.indices.map { TTTSignals(loss: loss[$0], learningRate: rate[$0], writeNorm: norm[$0]) }
    }

    /// The state in float32, one per layer; see `TTTModel`. The package has changes of the weights, in its own
    /// precision.
    public func state(position: Int) throws -> [LayerState] {
        let contents: Data
        switch memory {
        case .shared(let state): contents = Self.contents(of: state)
        case .separate(let forDecode, let forPrefill, let latestIsDecode):
            contents = Self.contents(of: latestIsDecode ? forDecode : forPrefill)
        case .array(let array): contents = Self.packed(array)
        }
        guard contents.count == layout.count * Self.bytesPerScalar else {
            throw TTTError.notATTTPackage("its state has another shape than its metadata says")
        }
        let scalars = contents.withUnsafeBytes { bytes in
            (0..<layout.count).map { index in
                Half.float(bytes.loadUnaligned(fromByteOffset: index * Self.bytesPerScalar, as: UInt16.self))
            }
        }
        return layout.unpack(scalars, start: start, offset: position)
    }

    /// Takes up a state, rounded to the precision of the package; see `TTTModel`.
    ///
    /// - Throws: `TTTError.stateOfAnotherModel`.
    public func restore(_ state: [LayerState]) throws {
        guard state.count == start.count, zip(state, start).allSatisfy({ $0.hasShape(of: $1) }) else {
            throw TTTError.stateOfAnotherModel
        }
        let contents = layout.pack(state, start: start).reduce(into: Data(capacity: 2 * layout.count)) { data, value in
            let bits = Half.bits(value)
            data.append(UInt8(truncatingIfNeeded: bits))
            data.append(UInt8(truncatingIfNeeded: bits >> 8))
        }
        try reset()
        switch memory {
        case .shared(let target), .separate(let target, _, _): try Self.fill(target, with: contents)
        case .array(let array): try Self.unpack(contents, into: array)
        }
    }

    /// Back to the state before the first token.
    public func reset() throws {
        var isSeparate = false
        if case .separate = memory { isSeparate = true }
        let prefiller = isSeparate ? try loadedPrefiller() : nil
        memory = try Self.empty(decoder: decoder, prefiller: prefiller, isSeparate: isSeparate)
    }

    /// Unloads the function that reads prompts. The next prompt of more than a token loads it again, which may take a
    /// while.
    public func giveBackMemory() {
        if case .separate = memory { return }  // its state goes from one model to the other
        prefiller = nil
    }

    private func loadedPrefiller() throws -> MLModel {
        let model = try prefiller ?? loadPrefiller()
        prefiller = model
        return model
    }

    // MARK: - Calling the model

    // Core ML's synchronous call: nothing else enters the actor while it runs, and one state allows one call.
    private func predict(_ given: [String: MLMultiArray], isDecode: Bool, length: Int) throws -> [Float] {
        shown = nil
        var inputs = given
        inputs["learning"] = learning
        let model = try isDecode ? decoder : loadedPrefiller()
        let outputs: any MLFeatureProvider
        switch memory {
        case .shared(let state):
            outputs = try model.prediction(from: Self.provider(inputs), using: state)
        case .separate(let forDecode, let forPrefill, let latestIsDecode):
            let state = isDecode ? forDecode : forPrefill
            if isDecode != latestIsDecode {
                try Self.fill(state, with: Self.contents(of: latestIsDecode ? forDecode : forPrefill))
            }
            memory = .separate(forDecode: forDecode, forPrefill: forPrefill, latestIsDecode: isDecode)
            outputs = try model.prediction(from: Self.provider(inputs), using: state)
        case .array(let array):
            let all = inputs.merging([Self.stateName: array]) { $1 }
            outputs = try model.prediction(from: Self.provider(all))
            guard let next = outputs.featureValue(for: Self.nextStateName)?.multiArrayValue else {
                throw TTTError.unexpectedOutput("no \(Self.nextStateName)")
            }
            memory = .array(next)
        }
        guard let array = outputs.featureValue(for: "logits")?.multiArrayValue else {
            throw TTTError.unexpectedOutput("no logits")
        }
        let logits = MLShapedArray<Float>(converting: array).scalars
        guard logits.count == info.vocabularySize else {
            throw TTTError.unexpectedOutput("\(logits.count) logits, expected \(info.vocabularySize)")
        }
        if info.givesSignals {
            let found = ["loss", "lr", "writeNorm"].compactMap { name in
                outputs.featureValue(for: name)?.multiArrayValue.map { (name, $0) }
            }
            shown = (Dictionary(found) { $1 }, length)
        }
        return logits
    }

    /// A signal [layers, heads, T] as [layers, heads] for each of the first `length` tokens.
    private static func byToken(_ name: String, _ arrays: [String: MLMultiArray], length: Int) throws -> [Tensor] {
        guard let array = arrays[name] else { throw TTTError.unexpectedOutput("no \(name)") }
        let shape = array.shape.map(\.intValue)
        guard shape.count == 3, shape[2] >= length else { throw TTTError.unexpectedOutput("\(name) \(shape)") }
        let scalars = MLShapedArray<Float>(converting: array).scalars
        return (0..<length).map { token in
            Tensor(
                shape: [shape[0], shape[1]],
                values: stride(from: token, to: scalars.count, by: shape[2]).map { scalars[$0] })
        }
    }

    private static func provider(_ inputs: [String: MLMultiArray]) throws -> MLDictionaryFeatureProvider {
        try MLDictionaryFeatureProvider(dictionary: inputs.mapValues { MLFeatureValue(multiArray: $0) })
    }

    private static func integers(_ scalars: [Int], shape: [Int]) -> MLMultiArray {
        MLMultiArray(MLShapedArray<Int32>(scalars: scalars.map { Int32($0) }, shape: shape))
    }

    private static func numbers(_ scalars: [Float], shape: [Int]) -> MLMultiArray {
        MLMultiArray(MLShapedArray<Float>(scalars: scalars, shape: shape))
    }

    // MARK: - The state

    /// The memory before the first token: zeros.
    private static func empty(decoder: MLModel, prefiller: MLModel?, isSeparate: Bool) throws -> Memory {
        let description = decoder.modelDescription
        if description.stateDescriptionsByName[stateName] != nil {
            guard isSeparate, let prefiller else { return .shared(decoder.makeState()) }
            return .separate(
                forDecode: decoder.makeState(), forPrefill: prefiller.makeState(), latestIsDecode: true)
        }
        guard let shape = description.inputDescriptionsByName[stateName]?.multiArrayConstraint?.shape else {
            throw TTTError.notATTTPackage("it has no \(stateName)")
        }
        let array = try MLMultiArray(shape: shape, dataType: .float16)
        array.withUnsafeMutableBytes { bytes, _ in
            _ = bytes.initializeMemory(as: UInt8.self, repeating: 0)
        }
        return .array(array)
    }

    private static func contents(of state: MLState) -> Data {
        state.withMultiArray(for: stateName) { packed($0) }
    }

    private static func fill(_ state: MLState, with data: Data) throws {
        try state.withMultiArray(for: stateName) { try unpack(data, into: $0) }
    }

    private static func packed(_ array: MLMultiArray) -> Data {
        let shape = array.shape.map(\.intValue)
        let layout = StridedMemory(shape: shape, strides: array.strides.map(\.intValue))
        var data = Data(count: shape.reduce(bytesPerScalar, *))
        data.withUnsafeMutableBytes { packed in
            array.withUnsafeBytes { memory in
                for run in layout.runs {
                    let source = memory[bytes(run.inMemory, run.count)]
                    UnsafeMutableRawBufferPointer(rebasing: packed[bytes(run.packed, run.count)])
                        .copyMemory(from: UnsafeRawBufferPointer(rebasing: source))
                }
            }
        }
        return data
    }

    private static func unpack(_ data: Data, into array: MLMultiArray) throws {
        let shape = array.shape.map(\.intValue)
        guard data.count == shape.reduce(bytesPerScalar, *) else { throw TTTError.damagedState }
        data.withUnsafeBytes { packed in
            array.withUnsafeMutableBytes { memory, strides in
                for run in StridedMemory(shape: shape, strides: strides).runs {
                    let source = packed[bytes(run.packed, run.count)]
                    UnsafeMutableRawBufferPointer(rebasing: memory[bytes(run.inMemory, run.count)])
                        .copyMemory(from: UnsafeRawBufferPointer(rebasing: source))
                }
            }
        }
    }

    private static func bytes(_ start: Int, _ count: Int) -> Range<Int> {
        (start * bytesPerScalar)..<((start + count) * bytesPerScalar)
    }
}
#endif
