import Foundation

/// What a model directory's `config.json` says of the network: the official fields and their defaults.
package struct ModelConfiguration: Sendable, Equatable {
    package enum InnerModel: String, Sendable {
        case linear, mlp
    }

    package var vocabularySize = 32000
    package var hiddenSize = 2048
    package var intermediateSize = 5504
    package var layers = 24
    package var heads = 32
    package var miniBatchSize = 16
    package var convKernel = 4
    package var normEpsilon = 1e-6
    package var ropeTheta = 10000.0
    package var baseLearningRate = 1.0
    package var tiesEmbeddings = true
    package var hasConvolution = false
    package var sharesQueriesAndKeys = false
    package var hasGate = false
    package var innerModel = InnerModel.linear
    package var beginToken: Int?
    package var endTokens: [Int] = []

    /// Of a head, a mini-batch and a convolution; no model is near it. What is computed with is allocated by these.
    private static let largest = 1024

    /// D
    package var headDim: Int { hiddenSize / heads }

    /// - Throws: `TTTError.unreadableFile`.
    package init(contentsOf file: URL) throws {
        do {
            try self.init(JSON(Data(contentsOf: file)))
        } catch {
            throw TTTError.unreadableFile(file.lastPathComponent, error.localizedDescription)
        }
    }

    package init(_ json: JSON) throws {
        guard json.members != nil else { throw TTTError.damaged("a configuration is an object") }
        func size(_ name: String, _ value: inout Int) throws {
            guard let given = json[name] else { return }
            guard let number = given.int, (1...1_000_000_000).contains(number) else {
                throw TTTError.damaged("\(name) is not a positive integer")
            }
            value = number
        }
        func number(_ name: String, _ value: inout Double) throws {
            guard let given = json[name] else { return }
            guard let number = given.number, number > 0, number.isFinite else {
                throw TTTError.damaged("\(name) is not a positive number")
            }
            value = number
        }
        func flag(_ name: String, _ value: inout Bool) throws {
            guard let given = json[name] else { return }
            guard let flag = given.bool else { throw TTTError.damaged("\(name) is not true or false") }
            value = flag
        }
        try size("vocab_size", &vocabularySize)
        try size("hidden_size", &hiddenSize)
        try size("intermediate_size", &intermediateSize)
        try size("num_hidden_layers", &layers)
        try size("num_attention_heads", &heads)
        try size("mini_batch_size", &miniBatchSize)
        try size("conv_kernel", &convKernel)
        try number("rms_norm_eps", &normEpsilon)
        try number("rope_theta", &ropeTheta)
        try number("ttt_base_lr", &baseLearningRate)
        try flag("tie_word_embeddings", &tiesEmbeddings)
        try flag("pre_conv", &hasConvolution)
        try flag("share_qk", &sharesQueriesAndKeys)
        try flag("use_gate", &hasGate)
        if let name = json["ttt_layer_type"] {
            guard let kind = name.string.flatMap(InnerModel.init) else {
                throw TTTError.damaged("ttt_layer_type is not linear or mlp")
            }
            innerModel = kind
        }
        guard max(miniBatchSize, convKernel, headDim) <= Self.largest else {
            throw TTTError.damaged("mini_batch_size, conv_kernel or the size of a head is over \(Self.largest)")
        }
        guard hiddenSize % heads == 0, headDim % 2 == 0 else {
            throw TTTError.damaged("hidden_size \(hiddenSize) does not divide into \(heads) heads of even size")
        }
        beginToken = json["bos_token_id"]?.int
        endTokens = json["eos_token_id"]?.array?.compactMap(\.int) ?? json["eos_token_id"]?.int.map { [$0] } ?? []
    }
}
