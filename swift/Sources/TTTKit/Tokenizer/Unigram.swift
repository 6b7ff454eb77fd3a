import TTTFormats

/// The segmentation of the best total score (Kudo 2018, found by Viterbi's algorithm).
struct Unigram: Sendable {
    private struct Edge: Hashable {
        let node: Int
        let byte: UInt8
    }

    private var edges: [Edge: Int] = [:]
    private var tokenOfNode: [Int: Int] = [:]
    private let scores: [Double]
    private let vocabulary: [[UInt8]: Int]
    private let byteTokens: [Int?]?
    private let unknown: Int?
    private let unknownScore: Double

    private static let unknownPenalty = 10.0

    init(_ json: JSON, vocabulary: [[UInt8]: Int]) throws {
        self.vocabulary = vocabulary
        let entries = json["vocab"]?.array ?? []
        let scores = entries.compactMap { $0.array?.last?.number.map(Self.asTokenizersReads) }
        guard scores.count == entries.count, !scores.isEmpty else { throw TTTError.damaged("scores of tokenizer.json") }
        self.scores = scores
        unknown = json["unk_id"]?.int
        unknownScore = (scores.min() ?? 0) - Self.unknownPenalty
        byteTokens = json["byte_fallback"]?.bool ?? false ? byteTokenIDs(vocabulary) : nil
        var nodes = 1
        for (token, entry) in entries.enumerated() {
            var node = 0
            for byte in entry.array?.first?.string?.utf8 ?? "".utf8 {
                let edge = Edge(node: node, byte: byte)
                if let known = edges[edge] {
                    node = known
                } else {
                    edges[edge] = nodes
                    node = nodes
                    nodes += 1
                }
            }
            tokenOfNode[node] = token
        }
    }

    /// A score as the library `tokenizers` has it: it reads the digits as a whole number, and divides by a power of ten,
    /// which may be off by one in the last place. Where two segmentations have the same score, that decides.
    private static func asTokenizersReads(_ score: Double) -> Double {
        let parts = "\(score.magnitude)".split(separator: "e")
        let number = (parts.first ?? "").split(separator: ".", omittingEmptySubsequences: false)
        let fraction = number.count > 1 ? number[1] : ""
        guard let digits = UInt64((number.first ?? "") + fraction), let written = Int(parts.count > 1 ? parts[1] : "0"),
            let power = Double("1e\(abs(written - fraction.count))")
        else { return score }
        let value = written < fraction.count ? Double(digits) / power : Double(digits) * power
        return score < 0 ? -value : value
    }

    /// Ids of a piece, in UTF-8.
    func callAsFunction(_ piece: [UInt8]) throws -> [Int] {
        try segments(piece).flatMap { segment in
            if let token = vocabulary[segment] { return [token] }
            if let byteTokens {
                let tokens = segment.compactMap { byteTokens[Int($0)] }
                if tokens.count == segment.count { return tokens }
            }
            guard let unknown else {
                throw TTTError.unsupported("The tokenizer has no token for \(String(decoding: segment, as: UTF8.self))")
            }
            return [unknown]
        }
    }

    /// The piece cut into tokens. Neighbours that are unknown are one.
    private func segments(_ piece: [UInt8]) -> [[UInt8]] {
        var best = [(score: Double, start: Int, isUnknown: Bool)?](repeating: nil, count: piece.count + 1)
        best[0] = (0, 0, false)
        var at = 0
        while at < piece.count {
            let score = best[at]?.score ?? 0
            let length = Self.length(ofCharacter: piece[at])
            func offer(_ end: Int, _ candidate: Double, isUnknown: Bool) {
                if let known = best[end], known.score >= candidate { return }
                best[end] = (candidate, at, isUnknown)
            }
            var (node, end, isSingle) = (0, at, false)
            while end < piece.count, let next = edges[Edge(node: node, byte: piece[end])] {
                (node, end) = (next, end + 1)
                guard let token = tokenOfNode[node] else { continue }
                offer(end, score + scores[token], isUnknown: token == unknown)
                isSingle = isSingle || end - at == length
            }
            if !isSingle { offer(min(at + length, piece.count), score + unknownScore, isUnknown: true) }
            at = min(at + length, piece.count)
        }

        var segments: [[UInt8]] = []
        var end = piece.count
        var isAfterUnknown = false
        while end > 0, let (_, start, isUnknown) = best[end] {
            let segment = Array(piece[start..<end])
            if isUnknown, isAfterUnknown, let last = segments.popLast() {
                segments.append(segment + last)
            } else {
                segments.append(segment)
            }
            (end, isAfterUnknown) = (start, isUnknown)
        }
        return segments.reversed()
    }

    private static func length(ofCharacter first: UInt8) -> Int {
        first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4
    }
}
