import Foundation

/// How to continue a text.
public struct TTTOptions: Sendable, Equatable {
    /// At most so many tokens.
    public var maxTokens: Int
    /// 0 always takes the likeliest token; 1 takes tokens as often as the model finds them likely.
    public var temperature: Double
    /// Only the likeliest tokens, so many; 0 for all.
    public var topK: Int
    /// Only the likeliest tokens that together have this probability; 1 for all.
    public var topP: Double
    /// Only tokens that are at least this likely, relative to the likeliest; 0 for all.
    public var minP: Double
    /// Logits of the last 20 tokens are divided by it where positive, multiplied where negative; 1 for none (Keskar et
    /// al. 2019).
    public var repetitionPenalty: Double
    /// The same seed gives the same text. None: another text each time.
    public var seed: UInt64?
    /// Texts at which to stop. They are read, but not shown.
    public var stopStrings: [String]
    /// Tokens at which to stop; those that the package names by default.
    public var endTokens: Set<Int>?

    /// Options that are not given take the likeliest token, 256 times at most.
    public init(
        maxTokens: Int = 256, temperature: Double = 0, topK: Int = 0, topP: Double = 1, minP: Double = 0,
        repetitionPenalty: Double = 1, seed: UInt64? = nil, stopStrings: [String] = [], endTokens: Set<Int>? = nil
    ) {
        self.maxTokens = maxTokens
        self.temperature = temperature
        self.topK = topK
        self.topP = topP
        self.minP = minP
        self.repetitionPenalty = repetitionPenalty
        self.seed = seed
        self.stopStrings = stopStrings
        self.endTokens = endTokens
    }

    /// The options that a `generation_config.json` gives.
    ///
    /// - Throws: `TTTError.unreadableFile`.
    public init(generationConfig file: URL) throws {
        do {
            let config = try JSONDecoder().decode(GenerationConfig.self, from: Data(contentsOf: file))
            let samples = config.do_sample ?? false
            self.init(
                maxTokens: config.max_new_tokens ?? 256,
                temperature: samples ? config.temperature ?? 1 : 0,
                topK: config.top_k ?? 0,
                topP: config.top_p ?? 1,
                minP: config.min_p ?? 0,
                repetitionPenalty: config.repetition_penalty ?? 1)
        } catch {
            throw TTTError.unreadableFile(file.lastPathComponent, error.localizedDescription)
        }
    }

    func check() throws {
        guard maxTokens > 0 else { throw TTTError.invalidOption("maxTokens is \(maxTokens), expected at least 1") }
        guard temperature >= 0, temperature.isFinite else {
            throw TTTError.invalidOption("temperature is \(temperature), expected 0 or more")
        }
        guard topK >= 0 else { throw TTTError.invalidOption("topK is \(topK), expected 0 or more") }
        guard topP > 0, topP <= 1 else {
            throw TTTError.invalidOption("topP is \(topP), expected more than 0 and at most 1")
        }
        guard (0...1).contains(minP) else { throw TTTError.invalidOption("minP is \(minP), expected 0 to 1") }
        guard repetitionPenalty > 0, repetitionPenalty.isFinite else {
            throw TTTError.invalidOption("repetitionPenalty is \(repetitionPenalty), expected more than 0")
        }
    }
}

/// The entries of a `generation_config.json` that are used, by their names there.
private struct GenerationConfig: Decodable {
    let do_sample: Bool?
    let temperature: Double?
    let top_k: Int?
    let top_p: Double?
    let min_p: Double?
    let repetition_penalty: Double?
    let max_new_tokens: Int?
}

/// Logits in, a token out.
struct Sampler {
    private let options: TTTOptions
    private var random: SplitMix64

    /// How many tokens back repetitions are looked for.
    static let lookBack = 20

    init(_ options: TTTOptions) {
        self.options = options
        random = SplitMix64(state: options.seed ?? UInt64.random(in: .min ... .max))
    }

    /// As in mlx-lm, top-k, top-p and min-p look at the probabilities at temperature 1.
    ///
    /// - Parameter context: the tokens before.
    mutating func next(_ logits: [Float], after context: [Int] = []) throws -> Int {
        guard !logits.isEmpty, logits.allSatisfy({ $0.isFinite }) else { throw TTTError.notANumber }
        var logits = logits
        if options.repetitionPenalty != 1 {
            for token in Set(context.suffix(Self.lookBack)) where logits.indices.contains(token) {
                let factor = Float(options.repetitionPenalty)
                logits[token] = logits[token] < 0 ? logits[token] * factor : logits[token] / factor
            }
        }
        var best = 0
        for token in logits.indices where logits[token] > logits[best] { best = token }
        guard options.temperature > 0 else { return best }

        let relative = logits.map { exp(Double($0) - Double(logits[best])) }  // probability / that of the best
        let candidates = likeliest(relative)
        let weights = candidates.map { pow(relative[$0], 1 / options.temperature) }
        var point = random.unit() * weights.reduce(0, +)
        for (token, weight) in zip(candidates, weights) {
            point -= weight
            if point < 0 { return token }
        }
        return best
    }

    private func likeliest(_ relative: [Double]) -> [Int] {
        var tokens = relative.indices.filter { relative[$0] >= options.minP }
        guard options.topK > 0 || options.topP < 1 else { return tokens }
        tokens.sort { (relative[$0], $1) > (relative[$1], $0) }  // the smaller token first among equals
        if options.topP < 1 {
            let wanted = options.topP * relative.reduce(0, +)
            var mass = 0.0
            let end = tokens.firstIndex { token in
                if mass >= wanted { return true }
                mass += relative[token]
                return false
            }
            tokens = Array(tokens[..<(end ?? tokens.endIndex)])
        }
        return options.topK > 0 ? Array(tokens.prefix(options.topK)) : tokens
    }
}

/// Steele, Lea and Flood's generator (2014): the same numbers on every device.
struct SplitMix64: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }

    /// A number from 0 up to, but not including, 1.
    mutating func unit() -> Double {
        Double(next() >> 11) * 0x1p-53
    }
}
