import TTTFormats

/// How a tokenizer cuts a text before it looks for tokens in the pieces. Texts are UTF-8.
indirect enum PreTokenizer: Sendable {
    case sequence([PreTokenizer])
    case split(Pattern, SplitBehavior, isInverted: Bool)
    case byteLevel(addsSpace: Bool, expression: Pattern?)
    case metaspace(replacement: [UInt8], prepends: MetaspacePrefix, splits: Bool)

    enum SplitBehavior: String, Sendable {
        case removed = "Removed"
        case isolated = "Isolated"
        case mergedWithPrevious = "MergedWithPrevious"
        case mergedWithNext = "MergedWithNext"
        case contiguous = "Contiguous"
    }

    enum MetaspacePrefix: String, Sendable {
        case always, never, first
    }

    /// That of GPT-2.
    private static let words =
        "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

    init(_ json: JSON?) throws {
        guard let json, !json.isNull else {
            self = .sequence([])
            return
        }
        let type = json["type"]?.string ?? ""
        switch type {
        case "Sequence": self = .sequence(try (json["pretokenizers"]?.array ?? []).map { try PreTokenizer($0) })
        case "Split":
            guard let behavior = json["behavior"]?.string.flatMap(SplitBehavior.init) else {
                throw TTTError.unsupported("tokenizer.json splits in a way that is not known here")
            }
            self = .split(try Pattern(json["pattern"]), behavior, isInverted: json["invert"]?.bool ?? false)
        case "Digits":
            let digits = try Pattern(expression: "\\p{N}")
            self = .split(
                digits, json["individual_digits"]?.bool ?? false ? .isolated : .contiguous, isInverted: false)
        case "ByteLevel":
            let expression = json["use_regex"]?.bool ?? true ? try Pattern(expression: Self.words) : nil
            self = .byteLevel(addsSpace: json["add_prefix_space"]?.bool ?? true, expression: expression)
        case "Metaspace":
            let scheme = json["prepend_scheme"]?.string ?? (json["add_prefix_space"]?.bool ?? true ? "always" : "never")
            guard let prefix = MetaspacePrefix(rawValue: scheme) else {
                throw TTTError.unsupported("tokenizer.json prepends \(scheme), which is not known here")
            }
            self = .metaspace(
                replacement: Array((json["replacement"]?.string ?? "\u{2581}").utf8), prepends: prefix,
                splits: json["split"]?.bool ?? true)
        default: throw TTTError.unsupported("tokenizer.json has a pre-tokenizer \(type), which is not known here")
        }
    }

    /// - Parameter isFirst: whether the first piece begins the text.
    func callAsFunction(_ pieces: [[UInt8]], isFirst: Bool) -> [[UInt8]] {
        switch self {
        case .sequence(let steps): return steps.reduce(pieces) { $1($0, isFirst: isFirst) }
        case .split(let pattern, let behavior, let isInverted):
            return pieces.flatMap { Self.split($0, pattern, behavior, isInverted: isInverted) }
        case .byteLevel(let addsSpace, let expression):
            return pieces.flatMap { piece in
                let text = addsSpace && piece.first != UInt8(ascii: " ") ? [UInt8(ascii: " ")] + piece : piece
                let words = expression.map { Self.split(text, $0, .isolated, isInverted: false) } ?? [text]
                return words.map(ByteAlphabet.characters)
            }
        case .metaspace(let replacement, let prefix, let splits):
            return pieces.enumerated().flatMap { index, piece in
                var text = piece.flatMap { $0 == UInt8(ascii: " ") ? replacement : [$0] }
                let prepends = prefix == .always || prefix == .first && isFirst && index == 0
                if prepends, !text.starts(with: replacement) { text = replacement + text }
                guard splits, !replacement.isEmpty else { return [text] }
                let pattern = Pattern(text: replacement)
                return Self.split(text, pattern, .mergedWithNext, isInverted: false)
            }
        }
    }

    private static func split(
        _ text: [UInt8], _ pattern: Pattern, _ behavior: SplitBehavior, isInverted: Bool
    ) -> [[UInt8]] {
        var parts: [(range: Range<Int>, isMatch: Bool)] = []
        var end = 0
        for match in pattern.matches(in: text) {
            if match.lowerBound > end { parts.append((end..<match.lowerBound, isInverted)) }
            parts.append((match, !isInverted))
            end = match.upperBound
        }
        if end < text.count { parts.append((end..<text.count, isInverted)) }
        return arranged(parts, behavior).filter { !$0.isEmpty }.map { Array(text[$0]) }
    }

    private static func arranged(
        _ parts: [(range: Range<Int>, isMatch: Bool)], _ behavior: SplitBehavior
    ) -> [Range<Int>] {
        switch behavior {
        case .isolated: return parts.map(\.range)
        case .removed: return parts.filter { !$0.isMatch }.map(\.range)
        case .contiguous, .mergedWithPrevious:
            var result: [Range<Int>] = []
            var previous: Bool?
            for (range, isMatch) in parts {
                let joins = behavior == .contiguous ? previous == isMatch : isMatch && previous == false
                if joins, let last = result.popLast() {
                    result.append(last.lowerBound..<range.upperBound)
                } else {
                    result.append(range)
                }
                previous = isMatch
            }
            return result
        case .mergedWithNext:
            var result: [Range<Int>] = []
            var next: Bool?
            for (range, isMatch) in parts.reversed() {
                if isMatch, next == false, let last = result.popLast() {
                    result.append(range.lowerBound..<last.upperBound)
                } else {
                    result.append(range)
                }
                next = isMatch
            }
            return result.reversed()
        }
    }
}
